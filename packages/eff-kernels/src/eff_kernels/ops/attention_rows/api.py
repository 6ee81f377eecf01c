"""row_scores and row_values: what one query per sequence thinks of all keys, and values summed by weights.

Both together with the weights of sinks scaled are row_calibrated.

Caches are read as they lie: no copy in float32, none for the query heads that share keys.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.op import needs_torch_dispatch
from eff_kernels.ops.common import check_devices

_SCORES = struct.Struct("PqqqPqqqqqqqqqdP")  # the fields of score_args in attention_rows.c
_scores = native.loader("eff_attention_row_scores", _SCORES)
_VALUES = struct.Struct("PPqqqqqqqqqPq")  # those of value_args
_values = native.loader("eff_attention_row_values", _VALUES)
_CALIBRATED = struct.Struct("PqqqPqqqqPqqqqqqqqqdPqPPPqdPPPPPq")  # those of calibrate_args
_calibrated = native.loader("eff_attention_row_calibrated", _CALIBRATED)


def row_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores scale * q[b, h] . k[b, h // (H / KV), s]. Where a gradient is wanted, plain PyTorch runs.

    Args:
        q: [B, H, D]; any float dtype.
        k: [B, KV, S, D]; H is a multiple of KV.
        scale: Factor.

    Returns:
        [B, H, S], computed in float32, or in float64 where one of them is.

    Raises:
        ValueError: shapes do not fit, or tensors lie on several devices.
    """
    if q.dim() != 3 or k.dim() != 4 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[3]) or _apart(q, k):
        raise ValueError(f"q [B, H, D] and k [B, KV, S, D] do not fit: got {list(q.shape)} and {list(k.shape)}")
    check_devices("row_scores", q=q, k=k)
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
        ValueError: shapes do not fit, or tensors lie on several devices.
    """
    fits = weights.dim() == 3 and v.dim() == 4 and (weights.shape[0], weights.shape[2]) == (v.shape[0], v.shape[2])
    if not fits or _apart(weights, v):
        raise ValueError(f"weights [B, H, S] and v [B, KV, S, D] do not fit: {list(weights.shape)}, {list(v.shape)}")
    check_devices("row_values", weights=weights, v=v)
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


class Limits(NamedTuple):
    """What makes a key a sink.

    Attributes:
        rows: Queries that could see each key, this one included, int64 [B, S], at least 1.
        may_be: Keys that may be sinks, bool [B, S].
        bound: Mean weight above which a key is one, float32 [B].
        spare_first: Whether the first key above it is none.
    """

    rows: Tensor
    may_be: Tensor
    bound: Tensor
    spare_first: bool = False


class CalibratedRow(NamedTuple):
    """What `row_calibrated` returns.

    Attributes:
        out: [B, H, Dv]; None where no head has a sink.
        sums: Weight that each key got, this query's included, float32 [B, H, S].
        sinks: bool [B, H, S].
        number: Sinks of all sequences, int64 [H].
        mass: Weight that they had, float32 [H].
    """

    out: Tensor | None
    sums: Tensor
    sinks: Tensor
    number: Tensor
    mass: Tensor


def row_calibrated(
    q: Tensor, k: Tensor, v: Tensor, scale: float, old: Tensor, limits: Limits, beta: float
) -> CalibratedRow:
    """One step of attention of a query that sees all keys: sinks are found anew and their weights scaled.

    A key is a sink if the mean of the weight that it got is above the bound. Sinks keep ``beta`` of their weight, and
    the others of the row get the rest in proportion to theirs; where they have none, all stays. Where a gradient is
    wanted, plain PyTorch runs.

    Args:
        q: [B, H, D]; any float dtype.
        k: [B, KV, S, D]; H is a multiple of KV.
        v: [B, KV, S, Dv].
        scale: Factor of the scores.
        old: Weight that the first n keys got before, float32 [B, H, n].
        limits: What makes a key a sink.
        beta: 0 to 1.

    Raises:
        ValueError: shapes do not fit, or tensors lie on several devices.
        TypeError: limits of other dtypes.
    """
    batch, heads, d = q.shape
    keys = k.shape[2]
    fits = k.shape[:3] == v.shape[:3] and (k.shape[0], k.shape[3]) == (batch, d) and not _apart(q, k)
    if not fits or old.shape[:2] != (batch, heads) or old.shape[2] > keys:
        raise ValueError(
            f"q [B, H, D], k [B, KV, S, D], v [B, KV, S, Dv] and old [B, H, n] do not fit: got {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}, {list(old.shape)}"
        )
    if limits.rows.shape != (batch, keys) or limits.may_be.shape != (batch, keys) or limits.bound.shape != (batch,):
        raise ValueError(
            f"limits must be for {batch} sequences of {keys} keys, got {[list(x.shape) for x in limits[:3]]}"
        )
    if [x.dtype for x in limits[:3]] != [torch.int64, torch.bool, torch.float32]:
        raise TypeError(f"limits must be int64, bool and float32, got {[x.dtype for x in limits[:3]]}")
    check_devices("row_calibrated", q=q, k=k, v=v, old=old, rows=limits.rows, may_be=limits.may_be, bound=limits.bound)
    plain = not _compiled(q, k) or not _compiled(q, v) or k.dtype is not v.dtype
    if plain or q.dtype not in DTYPE_CODES or q.stride(2) != 1 or old.dtype is not torch.float32:
        return _calibrated_plainly(q, k, v, scale, old, limits, beta)
    rows, may_be, bound, old = (x.contiguous() for x in (*limits[:3], old))
    sums, sinks = torch.empty(batch, heads, keys), torch.empty(batch, heads, keys, dtype=torch.bool)
    count, mass = torch.zeros(heads, dtype=torch.int64), torch.zeros(heads)
    out = q.new_empty((batch, heads, v.shape[3]), dtype=v.dtype)
    failed = _calibrated()(_CALIBRATED.pack(
        q.data_ptr(), DTYPE_CODES[q.dtype], q.stride(0), q.stride(1), k.data_ptr(), DTYPE_CODES[k.dtype],
        *k.stride()[:3], v.data_ptr(), *v.stride()[:3], batch, heads, k.shape[1], keys, d, v.shape[3], scale,
        old.data_ptr(), old.shape[2], rows.data_ptr(), may_be.data_ptr(), bound.data_ptr(), int(limits.spare_first),
        beta, sums.data_ptr(), sinks.data_ptr(), count.data_ptr(), mass.data_ptr(), out.data_ptr(),
        DTYPE_CODES[out.dtype],
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"row_calibrated could not allocate scratch memory for k {list(k.shape)}")
    return CalibratedRow(out if bool(count.any()) else None, sums, sinks, count, mass)


def _calibrated_plainly(
    q: Tensor, k: Tensor, v: Tensor, scale: float, old: Tensor, limits: Limits, beta: float
) -> CalibratedRow:
    weights = row_scores(q, k, scale).softmax(-1)
    sums = torch.nn.functional.pad(old, (0, k.shape[2] - old.shape[2])) + weights.detach().to(old.dtype)
    sinks = (sums / limits.rows[:, None] > limits.bound[:, None, None]) & limits.may_be[:, None]
    if limits.spare_first:
        sinks = sinks & (sinks.cumsum(-1) > 1)
    of_sinks = weights * sinks
    mass = of_sinks.sum(-1, keepdim=True)
    count = sinks.sum((0, 2))
    out = None
    if bool(count.any()):
        rest = (weights - of_sinks).sum(-1, keepdim=True)
        tiny = torch.finfo(rest.dtype).tiny
        own = torch.full_like(rest, beta).masked_fill(rest <= tiny, 1.0)
        gain = 1.0 + (1.0 - own) * mass / rest.clamp(min=tiny)
        out = row_values((weights - of_sinks) * gain + of_sinks * own, v, v.dtype)
    return CalibratedRow(out, sums, sinks, count, mass[..., 0].sum(0))


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
