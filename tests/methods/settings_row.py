"""Rows of methods on a small Llama, of which settings say all: they are saved beside the plain model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from method_table import Row, llama, logits, token_ids
from torch import Tensor, nn

_PICTURE = 96
TWO_RULES = "has 2 rules that change its attention, with order .*; give each its own order="


def settings_row(
    name: str,
    config: Any,
    apply: Callable[[nn.Module, Any], Any],
    *,
    make: Callable[[], nn.Module] = llama,
    zero: Any = None,
    **more: Any,
) -> Row:
    """The row of a method that ``apply(model, config)`` puts into a model; ``zero`` is a config
    with nothing to do, ``more`` is for `Row`."""

    def save(model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder / "model")
        torch.save(config.to_dict(), folder / "config.pt")

    def load(folder: Path) -> nn.Module:
        model = type(llama()).from_pretrained(folder / "model")
        apply(model, type(config).from_dict(torch.load(folder / "config.pt")))
        return model

    usual: dict[str, Any] = {"run": logits, "data": token_ids, "save": save, "load": load}
    usual["cannot"] = {"twice": TWO_RULES, "stranger": "wanted a decoder of transformers, got Sequential"}
    if zero is not None:
        usual["zero"] = lambda model: apply(model, zero)
    return Row(name=name, make=make, apply=lambda model: apply(model, config), **{**usual, **more})


def picture_llama(layers: int = 2) -> nn.Module:
    """A Llama some of whose tokens stand for pictures (`picture_ids`)."""
    model = llama(layers=layers)
    model.config.image_token_id = _PICTURE
    return model


def picture_ids(seed: int) -> Tensor:
    """Ids [B, T] with a picture in each row."""
    ids = token_ids(seed) % (_PICTURE - 1) + 1
    ids[:, 7:16] = _PICTURE
    return ids
