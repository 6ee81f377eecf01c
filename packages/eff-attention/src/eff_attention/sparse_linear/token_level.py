"""The keys of each query one by one, where the rest of the package takes whole blocks: how Lite3R trains."""

from __future__ import annotations

import torch
from eff_kernels import BlockMap, SparseLinearOutput, sparse_linear_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_SCORES = 2**22  # in memory together, of all heads


def token_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: float,
    feature_map: str = "elu",
    protect: tuple[int, int] | None = None,
    scale: float | None = None,
) -> SparseLinearOutput:
    """Softmax over the highest scores of each query, and linear attention over all keys (Lite3R, arXiv 2605.11354).

    sparse[i] = softmax(scale * q[i] . k[j]) v over the max(1, int(keep * Lk)) keys j of the highest score;
    linear[i] = phi(q[i]) . sum_j phi(k[j]) v[j]^T / phi(q[i]) . sum_j phi(k[j]) over all keys (the official
    code adds 1e-6 to the denominator).

    Every score is computed, so that this is slower than dense attention: it is for models that are trained or compared
    at the level of tokens. Queries are taken some at a time, and again in the backward: memory is linear in the length.
    Of equal scores the earlier key is kept. Sums are in float32, under autocast too. The choice has no gradient.

    Args:
        q: [B, H, L, D].
        k: [B, Hkv, Lk, D] of the same dtype; H must be a multiple of Hkv.
        v: [B, Hkv, Lk, Dv].
        keep: Share of the keys that each query keeps.
        feature_map: phi, "softmax", "elu" or "relu".
        protect: Range (start, stop) of keys that every query keeps; the count grows only where they alone are more.
        scale: Factor of the scores; D ** -0.5 by default.

    Returns:
        Both branches like q, and the logarithm of the sum of the exponentials of the scores kept, [B, H, L].
    """
    if not q.size(-1):
        raise ValueError(f"q must have a head dimension of at least 1, got {list(q.shape)}")
    blocks = BlockMap(q.new_zeros(*q.shape[:2], -(-q.size(2) // 64), -(-k.size(2) // 64), dtype=torch.int8), 64, 64)
    linear = sparse_linear_attention(q, k, v, blocks, feature_map=feature_map, linear_scope="all").linear
    wide = torch.promote_types(q.dtype, torch.float32)
    if not q.numel() or not v.numel():
        return SparseLinearOutput(torch.zeros_like(linear), linear, q.new_zeros(q.shape[:-1], dtype=wide))
    first, stop = protect or (0, 0)
    count = min(k.size(2), max(1, int(keep * k.size(2)), stop - first))
    scale = q.size(-1) ** -0.5 if scale is None else scale
    group = q.size(1) // k.size(1)

    def attend(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            scores = scale * (rows.to(wide).unflatten(1, (-1, group)) @ k.to(wide).unsqueeze(2).mT)
            scores = scores.masked_fill(~highest(scores.detach(), count, slice(first, stop)), -torch.inf)
            out = scores.softmax(-1) @ v.to(wide).unsqueeze(2)
            return out.flatten(1, 2).to(q.dtype), scores.logsumexp(-1).flatten(1, 2)

    step = max(1, _SCORES // (q.shape[:2].numel() * k.size(2)))
    parts = [checkpoint(attend, rows, k, v, use_reentrant=False) for rows in q.split(step, 2)]
    sparse, lse = (torch.cat(p, 2) for p in zip(*parts, strict=True))
    return SparseLinearOutput(sparse, linear, lse)


def highest(scores: Tensor, count: int, always: slice) -> Tensor:
    """Which ``count`` scores of each row are the highest, bool; earlier ones of equals, and ``always`` first of all."""
    scores = scores.clone()
    scores[..., always] = torch.inf
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
