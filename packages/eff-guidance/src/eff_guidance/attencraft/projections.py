"""Trainable copies of the projections that text goes through in attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels.edit import Handle, Report
from eff_kernels.edit.attention import find_attention, joint_attention
from torch import Tensor, nn

from eff_guidance.attencraft.config import Projection

_UNET = {"k": "to_k", "v": "to_v", "q": "to_q", "out": "to_out.0"}
_JOINT = {"k": "add_k_proj", "v": "add_v_proj", "q": "to_q", "out": "to_out.0"}


class ConceptLinear(nn.Module):
    """A linear layer with a weight of its own that starts as another one's, whose bias it shares.

    Args:
        base: The layer.
        still_first: Whether the first position of a sequence gives no gradient: the start of the text is no concept.
    """

    def __init__(self, base: nn.Linear, *, still_first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().clone())
        self.bias = base.bias
        self.still_first = still_first

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., positions, in]."""
        out = F.linear(x, self.weight, self.bias)
        if not self.still_first or not torch.is_grad_enabled():
            return out
        return torch.cat([out[..., :1, :].detach(), out[..., 1:, :]], -2)


def text_attention(model: nn.Module) -> list[str]:
    """Names of the attention modules in which places look at words: joint ones, or cross-attention."""
    names = joint_attention(model)
    if names:
        modules = dict(model.named_modules())
        return [n for n in names if getattr(modules[n], "add_k_proj", None) is not None]
    return [f.name for f in find_attention(model) if f.way and f.name.endswith("attn2")]


def train_projections(model: nn.Module, which: Sequence[Projection] = ("k", "v")) -> tuple[Handle, dict[str, Any]]:
    """Put trainable copies in the place of the projections of text keys and values, or more.

    The model's output stays bit-identical until they are trained. FLUX's single blocks, which do not tell text and
    picture apart, are left out.

    Args:
        model: A UNet or a transformer with joint attention.
        which: k and v are those of the text; q and out those of the picture.

    Returns:
        The handle that takes them back, with a report, and the new layers by their name in the model.

    Raises:
        ValueError: the model has no attention to text, or a projection is no linear layer or one that is cast by layer.
    """
    names = text_attention(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no attention to text")
    places = _JOINT if joint_attention(model) else _UNET
    handle, found = Handle(Report("train_projections")), {}
    try:
        for name in names:
            for kind in which:
                full = f"{name}.{places[kind]}"
                base = model.get_submodule(full)
                if not isinstance(base, nn.Linear):
                    raise ValueError(f"{full} is a {type(base).__name__}, not a plain linear layer")
                if base.weight.dtype.itemsize == 1:
                    raise ValueError(
                        f"{full} stores its weight as {base.weight.dtype}; apply what was learnt first, then cast"
                    )
                new = ConceptLinear(base, still_first=kind in ("k", "v")).to(base.weight.device)
                handle.replace(model, full, new)
                handle.report.change(full)
                found[full] = new
    except Exception:
        handle.remove()
        raise
    return handle, found
