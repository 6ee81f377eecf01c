"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Args(NamedTuple):
    """Of `rope`.

    Attributes:
        x: [B, H, T, D].
        cos: Cosine of the angle of each pair, [B or 1, T, R/2]; features from R on are copied.
        sin: Their sines.
        interleaved: Pairs are (2i, 2i+1), else (i, i + R/2).
        inverse: Turn by the negative angle: the inverse, which is also the gradient.
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool
    inverse: bool


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, cos, sin, *_ = args
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"x must be [batch, heads, tokens, features], got {list(shape)}")
    batch, _, tokens, d = shape
    table = cos.shape
    if sin.shape != table or len(table) != 3 or table[1] != tokens or table[0] not in (1, batch) or 2 * table[2] > d:
        raise ValueError(
            f"cos and sin must be [{batch} or 1, {tokens}, at most {d // 2}] for x of shape {list(shape)}, "
            f"got {list(table)} and {list(sin.shape)}"
        )
    if not x.dtype.is_floating_point or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(
            f"x must have a float dtype, cos and sin must be float32, got {x.dtype}, {cos.dtype}, {sin.dtype}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope has no gradient to cos and sin; detach them, or use the reference for learned angles")
