"""attention_columns: column sums of causal attention and log-sum-exps, without a map in memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.op import needs_torch_dispatch
from eff_kernels.ops.common import check_devices, check_groups

_ARGS = struct.Struct("PqqqPqqqqqqqqqqPqdPPqPqqq")  # the fields of args in attention_columns.c
_kernel = native.loader("eff_attention_columns", _ARGS)
_BLOCK = 128  # queries


class AttentionColumns(NamedTuple):
    """What `attention_columns` returns, float32, or float64 where queries or keys are.

    Attributes:
        sums: Weight of each key from all queries [B, h, S].
        lse: Log-sum-exp of the scores of each query [B, h, Sq].
    """

    sums: Tensor
    lse: Tensor


def attention_columns(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    heads: Sequence[int] | None = None,
    lse: Tensor | None = None,
) -> AttentionColumns:
    """Weights of causal attention summed over the queries, which are the last ones: query i sees S - Sq + i + 1 keys.

    The scores of sixteen queries at a time are in cache, and each is computed once. Where a gradient is wanted, plain
    PyTorch runs.

    Args:
        q: [B, H, Sq, D]; any float dtype.
        k: [B, KV, S, D]; query head h reads key head h // (H / KV).
        scale: Factor of the scores; D ** -0.5 by default.
        heads: Query heads; None for all.
        lse: Log-sum-exp of all heads [B, H, Sq], float32, if it is known: it saves one of two passes over the scores.

    Raises:
        ValueError: shapes do not fit, a head does not exist, or tensors lie on several devices.
    """
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q [B, H, Sq, D] and k [B, KV, S, D] with Sq <= S do not fit: got {list(q.shape)} and {list(k.shape)}"
        )
    check_groups(q.shape[1], k.shape[1])
    check_devices("attention_columns", q=q, k=k, **({} if lse is None else {"lse": lse}))
    batch, total, count, d = q.shape
    which = range(total) if heads is None else heads
    if any(not 0 <= h < total for h in which):
        raise ValueError(f"heads must be in 0..{total - 1}, got {list(which)}")
    if lse is not None and (lse.shape != q.shape[:3] or lse.dtype is not torch.float32):
        raise ValueError(f"lse must be float32 {list(q.shape[:3])}, got {lse.dtype} {list(lse.shape)}")
    factor = d**-0.5 if scale is None else float(scale)
    if not _fits(q, k) or not factor > 0:
        return _reference(q, k, factor, which)
    chosen = torch.tensor(list(which), dtype=torch.int64)
    keys = k.shape[2]
    sums = torch.zeros(batch, len(which), keys)
    own = torch.empty(batch, len(which), count) if lse is None else lse[:, list(which)]
    failed = _kernel()(_ARGS.pack(
        q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], DTYPE_CODES[q.dtype], batch, total, k.shape[1],
        count, keys, d, chosen.data_ptr(), len(which), factor, sums.data_ptr(), own.data_ptr(),
        torch.get_num_threads(), *((0, 0, 0, 0) if lse is None else (lse.data_ptr(), *lse.stride())),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"attention_columns could not allocate scratch memory for q {list(q.shape)}")
    return AttentionColumns(sums, own)


def _fits(q: Tensor, k: Tensor) -> bool:
    """Whether the compiled code can read them."""
    return (
        q.is_cpu
        and q.dtype in DTYPE_CODES
        and q.dtype is k.dtype
        and q.stride(3) == k.stride(3) == 1
        and q.shape[3] % 16 == 0
        and not needs_torch_dispatch((q, k))
        and native.unavailable() is None
    )


def _reference(q: Tensor, k: Tensor, scale: float, heads: Sequence[int]) -> AttentionColumns:
    """The same in plain PyTorch, by blocks of queries with the keys up to the last of them."""
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32
    count, keys = q.shape[2], k.shape[2]
    query, key = q[:, list(heads)].to(wide), k.to(wide)[:, [h * k.shape[1] // q.shape[1] for h in heads]]
    sums = query.new_zeros(query.shape[0], len(heads), keys)
    found = []
    for start in range(0, count, _BLOCK):
        stop = min(count, start + _BLOCK)
        end = keys - count + stop
        with torch.autocast(q.device.type, enabled=False):
            scores = query[:, :, start:stop] @ key[:, :, :end].mT * scale
        hidden = torch.ones(stop - start, end, dtype=torch.bool, device=q.device).triu(end - stop + start + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        found.append(scores.logsumexp(-1))
        sums[..., :end] += (scores - found[-1][..., None]).exp().sum(2)
    return AttentionColumns(sums, torch.cat(found, 2) if found else query.new_zeros(*query.shape[:2], 0))
