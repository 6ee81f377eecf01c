"""The products of unfused neighborhood attention in compiled code, from a table of the keys of each window."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.neighborhood_attention.common import window_index

_ARGS = struct.Struct("5q3P3q3q2Pq")  # the fields of nu_args in neighborhood_unfused.c
_kernel = native.loader_by_name(_ARGS, may_fail=False)


def reject(first: Tensor, second: Tensor, *windows: Sequence[Any]) -> str | None:
    """Why the compiled code cannot run this call."""
    if not first.is_cpu:
        return f"needs CPU tensors, got {first.device}"
    if first.dtype not in DTYPE_CODES or first.dtype != second.dtype:
        return f"takes two tensors of float32, bfloat16 or float16, got {first.dtype} and {second.dtype}"
    return native.unavailable()


def qk(query: Tensor, key: Tensor, *windows: Sequence[Any]) -> Tensor:
    """As the reference."""
    table = _table(query, windows)
    out = torch.empty(*query.shape[:-1], table.size(1))
    _call("eff_neighborhood_qk", table, _rows(query), _rows(key), None, out)
    return out.to(query.dtype)


def av(weights: Tensor, value: Tensor, *windows: Sequence[Any]) -> Tensor:
    """As the reference."""
    out = torch.empty(value.shape)
    _call("eff_neighborhood_av", _table(value, windows), None, _rows(value), weights, out)
    return out.to(value.dtype)


def inverse(weights: Tensor, rows: Tensor, *windows: Sequence[Any]) -> Tensor:
    """As the reference; the sums have a fixed order, whatever the number of threads."""
    out = torch.empty(rows.shape)
    _call("eff_neighborhood_inverse", _table(rows, windows), _rows(rows), None, weights, out)
    return out.to(rows.dtype)


@functools.lru_cache(maxsize=16)
def _keys(shape: tuple[int, ...], windows: tuple[tuple[Any, ...], ...]) -> Tensor:
    """Key of each query and slot, int32 [N, slots]; -1 where the window lacks one."""
    index, there = window_index(shape, *windows)
    return torch.where(there, index, -1).T.to(torch.int32).contiguous()


def _table(x: Tensor, windows: tuple[Sequence[Any], ...]) -> Tensor:
    return _keys(tuple(x.shape[2:-1]), tuple(tuple(w) for w in windows))


def _rows(x: Tensor) -> Tensor:
    """[B, H, N, D] in float32 with contiguous features; a view where the strides allow it."""
    x = x.float().flatten(2, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(name: str, table: Tensor, x: Tensor | None, y: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    given = x if x is not None else y
    assert given is not None
    batch, heads, tokens, d = given.shape
    held = None if weights is None else weights.float().contiguous()
    pointers = [0 if t is None else t.data_ptr() for t in (x, y)]
    strides = [(0, 0, 0) if t is None else t.stride()[:3] for t in (x, y)]
    _kernel(name)(_ARGS.pack(
        batch, heads, tokens, table.size(1), d, table.data_ptr(), *pointers, *strides[0], *strides[1],
        0 if held is None else held.data_ptr(), out.data_ptr(),
        native.threads_for(batch * heads * tokens * table.size(1) * d),
    ))  # fmt: skip
