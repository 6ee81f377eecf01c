"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_float, check_vector


class Args(NamedTuple):
    """Of `grouped_lora`."""

    x: Tensor
    a: Tensor
    b: Tensor
    ids: Tensor
    weights: Tensor | None
    scale: Tensor | None
    y: Tensor | None


class BackwardArgs(NamedTuple):
    """Of the backward of `grouped_lora`."""

    grad: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    ids: Tensor
    weights: Tensor | None
    scale: Tensor | None
    experts: bool


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, a, b, ids, weights, scale, y = args
    shape = x.shape
    if a.dim() != 3 or b.dim() != 3 or a.shape[:2] != (b.shape[0], b.shape[2]):
        raise ValueError(f"a [E, R, K] and b [E, N, R] do not fit: got {list(a.shape)} and {list(b.shape)}")
    if not shape or shape[-1] != a.shape[2]:
        raise ValueError(f"x must have shape [..., {a.shape[2]}] for a of shape {list(a.shape)}, got {list(shape)}")
    lead, (num_experts, n, _) = shape[:-1], b.shape
    if not ids.dim() or ids.shape[:-1] != lead:
        raise ValueError(f"ids must have shape {[*lead, 'k']} for x of shape {list(shape)}, got {list(ids.shape)}")
    if weights is not None and weights.shape != ids.shape:
        raise ValueError(f"weights must be of the shape of ids, {list(ids.shape)}, got {list(weights.shape)}")
    if scale is not None:
        check_vector(scale, "scale", num_experts)
    if y is not None and y.shape != (*lead, n):
        raise ValueError(f"y must have shape {[*lead, n]}, got {list(y.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
    if a.dtype != b.dtype:
        raise TypeError(f"a and b must have one dtype, got {a.dtype} and {b.dtype}")
    for name, tensor in (("x", x), ("a", a), ("weights", weights), ("scale", scale), ("y", y)):
        if tensor is not None:
            check_float(tensor, name)
