"""The spread of attention logits, block by block: never more than a block of them is held."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Spread = Literal["global", "row"]

# Logits held at a time, and the size from which an additive mask means "not at all" (diffusers masks with -10000).
BLOCK = 2**22
MASKED = -9999.0


class LogitMoments:
    """Running count, mean and sum of squared deviations of logits [B, H, ...] for each sample and head.

    ``"global"`` is the standard deviation over all pairs of query and key. ``"row"`` is the root of the mean variance
    within a query's row, which is what softmax sees: it ignores what a whole row has in common.
    """

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        self.count: Tensor | None = None
        self.mean: Tensor
        self.squares: Tensor

    def add(self, logits: Tensor, keep: Tensor | None) -> None:
        """Add a block [B, H, Q, K]; entries where ``keep`` (it broadcasts) is False do not count."""
        logits = logits.double()
        if keep is None:
            keep = torch.ones_like(logits, dtype=torch.bool)
        keep = keep.expand(logits.shape)
        logits = logits.masked_fill(~keep, 0.0)
        n_row = keep.sum(-1).double()  # [B, H, Q]
        mean_row = logits.sum(-1) / n_row.clamp_min(1)
        squares_row = (logits - mean_row[..., None]).masked_fill(~keep, 0.0).square().sum(-1)
        if self.spread == "row":
            used = n_row > 0
            new = used.sum(-1).double(), torch.zeros_like(n_row[..., 0]), (squares_row / n_row.clamp_min(1)).sum(-1)
        else:
            new = _merge_rows(n_row, mean_row, squares_row)
        if self.count is None:
            self.count, self.mean, self.squares = new
        else:
            n, mean, squares = new
            total = self.count + n
            delta = mean - self.mean
            share = n / total.clamp_min(1)
            self.squares = self.squares + squares + delta.square() * self.count * share
            self.mean = self.mean + delta * share
            self.count = total

    def std(self) -> tuple[Tensor, Tensor]:
        """Standard deviation [B, H] (that of a population), and which of the samples had any entries [B]."""
        if self.count is None:
            raise ValueError("no logits have been added")
        return (self.squares / self.count.clamp_min(1)).sqrt(), (self.count > 0).any(-1)


def _merge_rows(n: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = n.sum(-1)
    whole = (n * mean).sum(-1) / total.clamp_min(1)
    return total, whole, (squares + n * (mean - whole[..., None]).square()).sum(-1)


def add_products(moments: LogitMoments, q: Tensor, k: Tensor, scale: float, keep: Tensor | None, causal: bool) -> None:
    """Add q k^T * scale for q [B, H, Q, D] and k [B, H or fewer, K, D], in float32 and in blocks of queries.

    Args:
        moments: Where to.
        q: Queries.
        k: Keys; with fewer heads each serves a group of query heads.
        scale: Factor of the products.
        keep: bool, broadcasts to [B, H, Q, K]; False does not count.
        causal: Query i sees the keys up to i, as in torch's scaled_dot_product_attention.
    """
    b, h, num_q, d = q.shape
    num_k = k.shape[2]
    k = k.float().mT[:, :, None]
    step = max(1, BLOCK // max(1, b * h * num_k))
    for start in range(0, num_q, step):
        block = q[:, :, start : start + step].float()
        rows = block.shape[2]
        logits = (block.view(b, k.shape[1], -1, rows, d) @ k).view(b, h, rows, num_k) * scale
        part = keep
        if keep is not None and keep.shape[-2] > 1:
            part = keep[..., start : start + step, :]
        if causal:
            seen = torch.ones(rows, num_k, dtype=torch.bool, device=q.device).tril(start)
            part = seen if part is None else part & seen
        moments.add(logits, part)
