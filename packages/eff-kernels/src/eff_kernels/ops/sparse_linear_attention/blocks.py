"""The block map of sparse-linear attention: which key blocks a query block needs exactly, roughly, or not at all."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_kernels.ops.common import check_groups


class BlockMap(NamedTuple):
    """What `block_map` returns.

    Attributes:
        mask: int8 [B, H, Tm, Tn], one entry for a block of queries and a block of keys: 1 critical, 0 marginal,
            -1 negligible. Tm = ceil(L / block_q), Tn = ceil(Lk / block_k).
        block_q: Queries in a block; the last one may have fewer.
        block_k: Keys in a block; the last one may have fewer.
    """

    mask: Tensor
    block_q: int
    block_k: int


@torch.no_grad()
def block_map(
    q: Tensor,
    k: Tensor,
    *,
    k_high: float = 0.05,
    k_low: float = 0.10,
    block_q: int = 64,
    block_k: int = 64,
    smooth_k: bool = True,
    protect: tuple[int, int] | None = None,
) -> BlockMap:
    """Rank the key blocks of each query block by the score of their means (SLA, section 4.1).

    score[i, j] = mean(q of block i) . mean(k of block j), in float32; the softmax of the paper keeps its order. In each
    row the max(1, round(k_high * Tn)) highest are critical, the round(k_low * Tn) lowest, as far as others are left,
    negligible, and the rest marginal. Of equal scores the earlier block ranks higher. There is no gradient.

    Args:
        q: [B, H, L, D].
        k: [B, Hkv, Lk, D]; H must be a multiple of Hkv, and query head h reads key head h // (H / Hkv).
        k_high: Share of critical blocks.
        k_low: Share of negligible blocks; with ``k_high`` at most 1.
        block_q: Queries in a block.
        block_k: Keys in a block.
        smooth_k: Subtract the mean of all keys first. It moves the scores of a row alike: only rounding changes.
        protect: Range (start, stop) of keys whose blocks rank first in every row, such as a prefix of text. They are
            part of the critical share, which grows only where they alone are more.

    Raises:
        ValueError: shapes do not fit, or a share, block or range is out of bounds.
    """
    _check(q, k, k_high, k_low, block_q, block_k, protect)
    wide = torch.promote_types(q.dtype, torch.float32)
    pooled_q, pooled_k = _sums(q, block_q, wide), _sums(k, block_k, wide)
    counts = _counts(k, block_k).to(wide)
    smooth = pooled_k.sum(-2, keepdim=True) / max(k.size(2), 1) if smooth_k else 0
    pooled_q = pooled_q / _counts(q, block_q).to(wide)
    pooled_k = pooled_k / counts - smooth
    heads = (k.size(1), q.size(1) // k.size(1))
    score = (pooled_q.unflatten(1, heads) @ pooled_k.unsqueeze(2).mT).flatten(1, 2)
    tn, first = score.size(-1), 0
    if protect is not None and protect[1] > protect[0]:
        blocks = slice(protect[0] // block_k, -(-protect[1] // block_k))
        score[..., blocks] = torch.inf
        first = blocks.stop - blocks.start
    high = min(tn, max(1, round(k_high * tn), first))
    low = min(round(k_low * tn), tn - high)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.zeros(tn, dtype=torch.int8, device=q.device)
    ranks[:high], ranks[tn - low :] = 1, -1
    mask = torch.empty(score.shape, dtype=torch.int8, device=q.device)
    return BlockMap(mask.scatter_(-1, order, ranks.expand(score.shape)), block_q, block_k)


def num_blocks(length: int, block: int) -> int:
    """Blocks of a sequence, the last of which may be shorter."""
    return -(-length // block)


def _sums(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Sums over each block of rows, [B, H, T, D]."""
    missing = -x.size(2) % block
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (x.size(2) // block, block)).sum(3, dtype=dtype)


def _counts(x: Tensor, block: int) -> Tensor:
    """Rows of each block, [T, 1]."""
    start = torch.arange(num_blocks(x.size(2), block), device=x.device) * block
    return (x.size(2) - start).clamp(max=block)[:, None]


def _check(
    q: Tensor, k: Tensor, high: float, low: float, block_q: int, block_k: int, protect: tuple[int, int] | None
) -> None:
    check_heads(q, k)
    if not (0 <= high <= 1 and 0 <= low <= 1 and high + low <= 1):
        raise ValueError(f"k_high and k_low must be shares whose sum is at most 1, got {high} and {low}")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if protect is not None and not 0 <= protect[0] <= protect[1] <= k.size(2):
        raise ValueError(f"protect must be a range of the {k.size(2)} keys, got {protect}")


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raise where q and k are not heads of queries and keys that belong together."""
    if any(t.is_nested or t.layout != torch.strided for t in (q, k)):
        raise TypeError("sparse-linear attention takes dense tensors, got a sparse or nested one")
    if q.dim() != 4 or k.dim() != 4 or q.size(0) != k.size(0) or q.size(-1) != k.size(-1):
        raise ValueError(f"q [B, H, L, D] and k [B, Hkv, Lk, D] do not fit: got {list(q.shape)} and {list(k.shape)}")
    check_groups(q.size(1), k.size(1))
    if not q.is_floating_point() or k.dtype != q.dtype:
        raise TypeError(f"q and k must have one float dtype, got {q.dtype} and {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"q and k must be on one device, got {q.device} and {k.device}")
