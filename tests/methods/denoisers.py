"""Tiny diffusion transformers and their pipelines for the rows, from the tests of eff-guidance."""

import functools
from typing import Any

import torch
from method_table import Row, neighbour, normal
from torch import Tensor

TINY = neighbour("packages/eff-guidance/tests/conftest.py")
make_sd3 = functools.partial(TINY.sd3_transformer, layers=2)
latents = normal(2, 4, 16, 16)


def denoise(model: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A pass [B, 4, 16, 16] with the words that belong to the latents, whatever the batch."""
    words = torch.randn(6, 32, generator=torch.Generator().manual_seed(5)).to(x.dtype).expand(len(x), -1, -1)
    shift = x.mean((1, 2, 3))[:, None]
    return model(
        hidden_states=x, encoder_hidden_states=words + shift[..., None], timestep=x.new_full((len(x),), 400.0),
        pooled_projections=words[:, 0].repeat(1, 2) + shift, return_dict=False,
    )[0]  # fmt: skip


def sd3_row(name: str, **more: Any) -> Row:
    """The row of a method on a transformer of SD3's class."""
    usual = {"host": "other", "make": make_sd3, "run": denoise, "data": latents, "lora": ("to_q", "to_out.0")}
    return Row(name=name, **{**usual, **more})
