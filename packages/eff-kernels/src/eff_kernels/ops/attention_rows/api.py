"""row_scores and row_values: what one query per sequence thinks of all keys, and values summed by weights.

Caches are read as they lie: no copy in float32, none for the query heads that share keys.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.op import needs_torch_dispatch

_SCORES = struct.Struct("PqqqPqqqqqqqqqdP")  # the fields of score_args in attention_rows.c
_scores = native.loader("eff_attention_row_scores", _SCORES)
_VALUES = struct.Struct("PPqqqqqqqqqPq")  # those of value_args
_values = native.loader("eff_attention_row_values", _VALUES)


def row_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores scale * q[b, h] . k[b, h // (H / KV), s]. Where a gradient is wanted, plain PyTorch runs.

    Args:
        q: [B, H, D]; any float dtype.
        k: [B, KV, S, D]; H is a multiple of KV.
        scale: Factor.

    Returns:
        [B, H, S], computed in float32, or in float64 where one of them is.

    Raises:
        ValueError: shapes do not fit.
    """
    if q.dim() != 3 or k.dim() != 4 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[3]) or _apart(q, k):
        raise ValueError(f"q [B, H, D] and k [B, KV, S, D] do not fit: got {list(q.shape)} and {list(k.shape)}")
    batch, heads, d = q.shape
    _, kv_heads, keys, _ = k.shape
    if not _compiled(q, k) or q.dtype not in DTYPE_CODES or q.stride(2) != 1:
        wide = _wide(q, k)
        with torch.autocast(q.device.type, enabled=False):
            products = q.to(wide).reshape(batch, kv_heads, -1, d) @ k.to(wide).mT
        return products.reshape(batch, heads, keys) * scale
    out = q.new_empty((batch, heads, keys), dtype=torch.float32)
    failed = _scores()(_SCORES.pack(
        q.data_ptr(), DTYPE_CODES[q.dtype], q.stride(0), q.stride(1), k.data_ptr(), DTYPE_CODES[k.dtype],
        k.stride(0), k.stride(1), k.stride(2), batch, heads, kv_heads, keys, d, scale, out.data_ptr(),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"row_scores could not allocate scratch memory for q {list(q.shape)}")
    return out


def row_values(weights: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over s of weights[b, h, s] v[b, h // (H / KV), s], computed as wide as in `row_scores`.

    Where a gradient is wanted, plain PyTorch runs.

    Args:
        weights: [B, H, S].
        v: [B, KV, S, D]; H is a multiple of KV.
        dtype: Of the result.

    Returns:
        [B, H, D].

    Raises:
        ValueError: shapes do not fit.
    """
    fits = weights.dim() == 3 and v.dim() == 4 and (weights.shape[0], weights.shape[2]) == (v.shape[0], v.shape[2])
    if not fits or _apart(weights, v):
        raise ValueError(f"weights [B, H, S] and v [B, KV, S, D] do not fit: {list(weights.shape)}, {list(v.shape)}")
    batch, heads, keys = weights.shape
    _, kv_heads, _, d = v.shape
    if not _compiled(weights, v) or dtype not in DTYPE_CODES or weights.dtype is torch.float64:
        wide = _wide(weights, v)
        with torch.autocast(v.device.type, enabled=False):
            sums = weights.to(wide).reshape(batch, kv_heads, -1, keys) @ v.to(wide)
        return sums.reshape(batch, heads, d).to(dtype)
    weights = weights.float().contiguous()
    out = v.new_empty((batch, heads, d), dtype=dtype)
    failed = _values()(_VALUES.pack(
        weights.data_ptr(), v.data_ptr(), DTYPE_CODES[v.dtype], v.stride(0), v.stride(1), v.stride(2),
        batch, heads, kv_heads, keys, d, out.data_ptr(), DTYPE_CODES[dtype],
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"row_values could not allocate scratch memory for weights {list(weights.shape)}")
    return out


def _apart(rows: Tensor, cache: Tensor) -> bool:
    """Whether the heads of a cache cannot be shared evenly."""
    return not cache.shape[1] or rows.shape[1] % cache.shape[1] != 0


def _wide(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _compiled(rows: Tensor, cache: Tensor) -> bool:
    """Whether the compiled code can read keys or values."""
    return (
        cache.is_cpu
        and cache.dtype in DTYPE_CODES
        and cache.stride(3) == 1
        and cache.shape[3] % 8 == 0
        and not needs_torch_dispatch((rows, cache))
        and native.unavailable() is None
    )
