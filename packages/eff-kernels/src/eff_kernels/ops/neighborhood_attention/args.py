"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_groups


class Args(NamedTuple):
    """Of `neighborhood_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    scale: float
    additional_keys: Tensor
    additional_values: Tensor


class BackwardArgs(NamedTuple):
    """Of the backward of `neighborhood_attention`."""

    grad: Tensor
    grad_lse: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    scale: float
    additional_keys: Tensor
    additional_values: Tensor


def each_axis(name: str, value: Any, rank: int, kind: type) -> list[Any]:
    """One value an axis, from one for all or one for each."""
    values = [value] * rank if isinstance(value, kind) else list(value) if isinstance(value, Sequence) else [value]
    if len(values) != rank or any(type(v) is not kind for v in values):
        raise ValueError(f"{name} must be one {kind.__name__}, or one for each of the {rank} axes, got {value!r}")
    return values


def check_windows(shape: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
    """Raise ValueError where a window does not fit its axis."""
    for axis, (length, k, s, d) in enumerate(zip(shape, window, stride, dilation, strict=True)):
        if k < 2:
            raise ValueError(f"kernel_size must be at least 2, got {k} on axis {axis}")
        if not 1 <= s <= k:
            raise ValueError(f"stride must be from 1 to kernel_size = {k}, got {s} on axis {axis}")
        if d < 1:
            raise ValueError(f"dilation must be at least 1, got {d} on axis {axis}")
        if k * d > length:
            raise ValueError(
                f"kernel_size * dilation = {k} * {d} must be at most the length of the axis, {length}, on axis {axis}"
            )


def check_tensors(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor | None, more_v: Tensor | None) -> None:
    """Raise ValueError or TypeError unless the tensors fit."""
    tensors = [t for t in (q, k, v, more_k, more_v) if t is not None]
    if any(t.is_nested or t.layout != torch.strided for t in tensors):
        raise TypeError("neighborhood attention takes dense tensors, got a sparse or nested one")
    shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
    if not 4 <= q.dim() <= 6:
        raise ValueError(f"query must be [B, *S, H, D] with one to three axes S, got {list(q.shape)}")
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2] or q.size(-1) != k.size(-1):
        raise ValueError(f"query [B, *S, H, D], key [B, *S, Hkv, D], value [B, *S, Hkv, Dv] do not fit: got {shapes}")
    check_groups(q.size(-2), k.size(-2))
    if not q.is_floating_point() or any(t.dtype != q.dtype for t in tensors):
        raise TypeError(f"all tensors must have one float dtype, got {[t.dtype for t in tensors]}")
    if any(t.device != q.device for t in tensors):
        raise ValueError(f"all tensors must be on one device, got {[str(t.device) for t in tensors]}")
    if (more_k is None) != (more_v is None):
        raise ValueError("additional_keys and additional_values must be given together, got only one")
    if more_k is None or more_v is None:
        return
    wanted = [(k.size(0), more_k.size(1) if more_k.dim() == 4 else -1, *t.shape[-2:]) for t in (k, v)]
    if [tuple(more_k.shape), tuple(more_v.shape)] != wanted:
        raise ValueError(
            f"additional_keys and additional_values must be [{k.size(0)}, M, {k.size(-2)}, {k.size(-1)}] and "
            f"[{v.size(0)}, M, {v.size(-2)}, {v.size(-1)}], got {list(more_k.shape)} and {list(more_v.shape)}"
        )
