"""Taylor attention in chunks: within a chunk as a matrix of weights, between chunks through the features.

A token costs 4 F Dv operations for the features and C (D + Dv) for its chunk of C tokens. With 64 features a head the
matrix of all tokens is less work up to some 4000 tokens, which is why a "chunk" may be the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eff_kernels.ops.taylor_linear_attention.args import Args, BackwardArgs
from eff_kernels.ops.taylor_linear_attention.common import (
    features,
    features_backward,
    num_features,
    numerator_gradient,
    safe,
    taylor_state_shape,
    with_ones,
)

_ROWS = 128  # queries of one matrix of weights
_ELEMENTS = 1 << 19  # of such a matrix, over as many heads as fit: it stays in the second-level cache


def reject(q: Tensor, *args: object) -> str | None:
    """Why the chunked products cannot run this call."""
    return None if q.is_cpu else f"needs CPU tensors, got q on {q.device.type}"


def reject_backward(grad: Tensor, *args: object) -> str | None:
    """Why the chunked products cannot run this call."""
    return reject(grad)


def pick_chunk(t: int, d: int, e: int) -> int:
    """The whole sequence if that is less work, else 256."""
    return max(t, 1) if t * (d + e) <= 4 * num_features(d) * (e + 1) + 256 * (d + e) else 256


def forward(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    q, k, v, key_mask, chunk_size, scale, state, return_state = args
    q_, k_, v_, carried = by_head(q, k, v, key_mask, scale, state)
    total = v_.new_empty(*q_.shape[:-1], v_.size(-1))
    final = v_.new_zeros(taylor_state_shape(k, v) if return_state else 0)
    for heads in _slabs(q_, chunk_size):
        qs, ks, vs, before = q_[heads], k_[heads], v_[heads], None if carried is None else carried[heads]
        for start, stop in spans(0, q.size(2), chunk_size):
            for a, b in spans(start, stop, _ROWS):
                rows = qs[:, :, a:b].flatten(1, 2)
                part = _causal(_polynomial(rows @ ks[:, start:b].mT), a, b) @ vs[:, start:b]
                if before is not None:
                    part.baddbmm_(features(rows).mT, before)
                total[heads, :, a:b] = part.unflatten(1, (-1, b - a))
            if stop < q.size(2) or return_state:
                before = add(before, features(ks[:, start:stop]) @ vs[:, start:stop])
        if return_state and before is not None:
            final.flatten(0, 1)[heads] = before
    norm = total[..., -1]
    out = (total[..., :-1] / safe(norm).unsqueeze(-1)).to(q.dtype)
    return out.view(*q.shape[:-1], v.size(-1)), norm.clone().view(q.shape[:-1]), final


def backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference: forwards over the chunks for the queries, backwards for keys and values."""
    grad, q, k, v, out, norm, key_mask, chunk_size, scale, state = args
    q_, k_, v_, carried = by_head(q, k, v, key_mask, scale, state)
    g_ = numerator_gradient(grad, out, norm).view(*q_.shape[:-1], v.size(-1) + 1)
    dq, dk, dv = torch.zeros_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
    for heads in _slabs(q_, chunk_size):
        qs, ks, vs, gs = q_[heads], k_[heads], v_[heads], g_[heads]
        before, chunks = None if carried is None else carried[heads], list(spans(0, q.size(2), chunk_size))
        for start, stop in chunks:
            for a, b in spans(start, stop, _ROWS):
                rows, cols = qs[:, :, a:b].flatten(1, 2), slice(start, b)
                g = gs[:, :, a:b].flatten(1, 2)
                score = rows @ ks[:, cols].mT
                dscore = _causal((g @ vs[:, cols].mT).mul_(score + 1), a, b)
                more = dscore @ ks[:, cols]
                if before is not None:
                    more += features_backward(rows, before @ g.mT)
                dq[heads, :, a:b] = more.unflatten(1, (-1, b - a))
                dk[heads, cols].baddbmm_(dscore.mT, rows)
                dv[heads, cols].baddbmm_(_causal(_polynomial(score), a, b).mT, g)
            if stop < q.size(2):
                before = add(before, features(ks[:, start:stop]) @ vs[:, start:stop])
        after = None
        for start, stop in reversed(chunks):
            if after is not None:
                span = ks[:, start:stop]
                dk[heads, start:stop] += features_backward(span, after @ vs[:, start:stop].mT)
                dv[heads, start:stop] += features(span).mT @ after
            if start:
                after = add(after, features(qs[:, :, start:stop].flatten(1, 2)) @ gs[:, :, start:stop].flatten(1, 2))
    dv = dv[..., :-1] if key_mask is None else dv[..., :-1] * mask_by_head(key_mask, k)
    return (dq * scale).view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.reshape(v.shape).to(v.dtype)


def by_head(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scaled queries [N, G, T, D], keys [N, T, D], values and ones [N, T, Dv + 1] of N key heads; state [N, F, ..]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    n, groups = k.size(0) * k.size(1), q.size(1) // k.size(1)
    queries = (q.to(wide) * scale).reshape(n, groups, *q.shape[2:])
    keys = k.to(wide).reshape(n, *k.shape[2:])
    values = with_ones(v.to(wide), key_mask).reshape(n, v.size(2), v.size(3) + 1)
    return queries, keys, values, None if state is None else state.to(wide).reshape(n, *state.shape[2:])


def mask_by_head(key_mask: Tensor, k: Tensor) -> Tensor:
    """The mask as [N, T, 1]."""
    return key_mask.repeat_interleave(k.size(1), 0).unsqueeze(-1)


def _polynomial(score: Tensor) -> Tensor:
    return (score * 0.5).add_(1).mul_(score).add_(1)


def _causal(weight: Tensor, a: int, b: int) -> Tensor:
    """Zero, in place, where a key of the last b - a columns comes after the query of a row."""
    last = weight.unflatten(1, (-1, b - a))[..., a - b :]
    last.tril_()
    return weight


def add(total: Tensor | None, more: Tensor) -> Tensor:
    """Their sum, in the memory of ``more``."""
    return more if total is None else more.add_(total)


def _slabs(q: Tensor, chunk_size: int) -> Iterator[slice]:
    """Heads whose matrices of weights are computed together."""
    n, groups, t, _ = q.shape
    step = max(1, _ELEMENTS // max(1, groups * min(t, _ROWS) * min(t, chunk_size)))
    for start in range(0, n, step):
        yield slice(start, start + step)


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Pieces of a range."""
    for a in range(start, stop, step):
        yield a, min(a + step, stop)
