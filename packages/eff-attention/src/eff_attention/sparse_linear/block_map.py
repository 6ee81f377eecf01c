"""Which blocks of keys matter to which blocks of queries (section 3.1 of arXiv 2509.24006)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_attention.sparse_linear.config import check_shares


class BlockMap(NamedTuple):
    """A class for each pair of blocks.

    Attributes:
        mask: int8 [B, H, ceil(Lq / block_q), ceil(Lk / block_k)]: 1 critical, 0 marginal, -1 negligible.
        block_q: Queries in a block.
        block_k: Keys in a block.
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
    """Rank the blocks of keys for each block of queries by the product of their means.

    Each row gets ``max(1, round(k_high n))`` critical and ``round(k_low n)`` negligible ones of its n blocks, however
    near their scores are: of equal scores the earlier block ranks higher. No gradient.

    Args:
        q: [B, H, Lq, D].
        k: [B, Hkv, Lk, D], H a multiple of Hkv.
        k_high: Share of critical blocks.
        k_low: Share of negligible blocks.
        block_q: Queries in a block.
        block_k: Keys in a block.
        smooth_k: Whether the mean over all keys is taken off first. It does not change the ranking but for rounding.
        protect: Keys start .. stop - 1, whose blocks are critical in addition.

    Raises:
        ValueError: shares outside of [0, 1] or over 1 together, or heads that do not fit.
    """
    check_shares(k_high, k_low)
    if k.size(1) == 0 or q.size(1) % k.size(1):
        raise ValueError(f"the number of query heads, {q.size(1)}, must be a multiple of the key heads, {k.size(1)}")
    if smooth_k:
        k = k.float() - k.float().mean(2, keepdim=True)
    pooled_q, pooled_k = _pool(q, block_q), _pool(k, block_k)
    scores = (pooled_q.unflatten(1, (k.size(1), -1)) @ pooled_k[:, :, None].mT).flatten(1, 2)
    count = scores.size(-1)
    high = min(count, max(1, round(k_high * count)))
    low = min(count - high, round(k_low * count))
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(scores.shape, dtype=torch.int8, device=q.device)
    mask.scatter_(-1, order[..., :high], 1)
    mask.scatter_(-1, order[..., count - low :], -1)
    if protect is not None and protect[1] > protect[0]:
        mask[..., protect[0] // block_k : -(-protect[1] // block_k)] = 1
    return BlockMap(mask, block_q, block_k)


def _pool(x: Tensor, block: int) -> Tensor:
    """Means of blocks of tokens in float32; the last block is the mean of what it holds."""
    length = x.size(2)
    full = F.pad(x.float(), (0, 0, 0, -length % block)).unflatten(2, (-1, block)).sum(3)
    sizes = torch.full((full.size(2),), float(block), device=x.device)
    if length % block:
        sizes[-1] = length % block
    return full / sizes[:, None]
