"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_groups
from eff_kernels.ops.taylor_linear_attention.common import taylor_state_shape


class Args(NamedTuple):
    """Of `taylor_linear_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    chunk_size: int
    scale: float
    state: Tensor | None
    return_state: bool


class BackwardArgs(NamedTuple):
    """Of the backward of `taylor_linear_attention`."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    norm: Tensor
    key_mask: Tensor | None
    chunk_size: int
    scale: float
    state: Tensor | None


def check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: Tensor | None) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [B, H, T, D], got {shapes}")
    if k.shape[:-1] != v.shape[:-1] or (q.size(0), *q.shape[2:]) != (k.size(0), *k.shape[2:]):
        raise ValueError(f"q [B, H, T, D], k [B, Hkv, T, D] and v [B, Hkv, T, Dv] do not fit: got {shapes}")
    check_groups(q.size(1), k.size(1))
    if not q.is_floating_point() or any(t.dtype != q.dtype for t in (k, v)):
        raise TypeError(f"q, k and v must have one float dtype, got {[str(t.dtype) for t in (q, k, v)]}")
    if key_mask is not None and (key_mask.dtype != torch.bool or tuple(key_mask.shape) != (q.size(0), q.size(2))):
        raise ValueError(
            f"key_mask must be bool [{q.size(0)}, {q.size(2)}], got {key_mask.dtype} {list(key_mask.shape)}"
        )
    if state is None:
        return
    wanted = taylor_state_shape(k, v)
    if tuple(state.shape) != wanted:
        raise ValueError(f"state must be {list(wanted)} for these keys and values, got {list(state.shape)}")
    if state.requires_grad:
        raise ValueError("state must not require a gradient; detach it")
