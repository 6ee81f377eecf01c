"""Losses over pairs of cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _cosines(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    if a.ndim != 3 or b.ndim != 3 or mask.shape != (a.size(0), a.size(1), b.size(1)):
        raise ValueError(
            f"wanted cells [B, N, d] and [B, M, d] with a mask [B, N, M], got {list(a.shape)}, {list(b.shape)}, "
            f"{list(mask.shape)}"
        )
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).mT


def pixpro_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """One direction of PixPro: ``-2`` times the mean cosine of positive pairs, of each picture, then of the batch.

    Pictures without a pair count as 0; the loss of both directions lies in [-4, 4].

    Args:
        prediction: Propagated cells of the online branch, [B, N, d].
        target: Cells of the momentum branch, [B, M, d]; no gradient reaches them.
        mask: bool [B, N, M], see `positive_mask`.
    """
    cosines = _cosines(prediction, target.detach(), mask)
    pairs = mask.sum((1, 2))
    return -2 * ((cosines * mask).sum((1, 2)) / pairs.clamp_min(1)).mean()


def pixcontrast_loss(a: Tensor, b: Tensor, mask: Tensor, *, tau: float = 0.3) -> Tensor:
    """One direction of PixContrast: each cell finds its positives among all cells of the other view (eq. 2).

    The mean is over cells that have a positive; without any the loss is 0.

    Args:
        a: Cells of one view, [B, N, d].
        b: Cells of the other, [B, M, d].
        mask: bool [B, N, M].
        tau: Temperature.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    logits = _cosines(a, b, mask) / tau
    has = mask.any(-1)
    positives = logits.masked_fill(~mask, -torch.inf)
    each = logits[has].logsumexp(-1) - positives[has].logsumexp(-1)
    return each.sum() / has.sum().clamp_min(1)
