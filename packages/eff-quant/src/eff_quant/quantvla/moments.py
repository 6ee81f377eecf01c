"""The spread of attention logits, added up block by block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Spread = Literal["global", "row"]

# The size from which an additive mask means "not at all" (diffusers masks with -10000).
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

    def add(self, logits: Tensor, keep: Tensor) -> None:
        """Add a block [B, H, Q, K]; entries where ``keep`` (it broadcasts) is False do not count."""
        logits = logits.double()
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
