"""How well full masks, and their hidden parts, were found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AmodalScores(NamedTuple):
    """Means over objects and frames.

    Attributes:
        miou_full: Intersection over union of full masks.
        miou_occ: Of the parts that are hidden; NaN if nothing was.
    """

    miou_full: float
    miou_occ: float


class AmodalMeter:
    """Adds up intersections over unions; a frame without a full mask does not count.

    Args:
        legacy: The official code's rule for hidden parts: a frame that comes out at exactly 1 is left out, and one
            where nothing is hidden and nothing was predicted to be counts as 0. Otherwise the mean is over frames
            where at least one pixel is hidden.
    """

    def __init__(self, *, legacy: bool = False) -> None:
        self.legacy = legacy
        self.sums = torch.zeros(2, 2, dtype=torch.float64)  # full and hidden: sum and count

    def update(self, prediction: Tensor, full: Tensor, visible: Tensor) -> None:
        """Add masks [N, H, W] of whole frames, bool.

        Raises:
            ValueError: shapes differ, or masks are not bool.
        """
        if not prediction.shape == full.shape == visible.shape or prediction.dim() != 3:
            shapes = [list(m.shape) for m in (prediction, full, visible)]
            raise ValueError(f"prediction, full and visible must be [N, H, W] of one shape, got {shapes}")
        if not all(m.dtype == torch.bool for m in (prediction, full, visible)):
            raise ValueError("masks must be bool: compare probabilities with 0.5 first")
        present = full.flatten(1).any(1)
        self._add(0, _iou(prediction, full)[present])
        hidden = full & ~visible
        score = _iou(prediction & ~visible, hidden)
        if self.legacy:
            score = score.nan_to_num(0.0)[present]
            self._add(1, score[score != 1])
        else:
            self._add(1, score[present & hidden.flatten(1).any(1)])

    def _add(self, row: int, scores: Tensor) -> None:
        self.sums[row] += torch.tensor([float(scores.sum()), float(len(scores))], dtype=torch.float64)

    def reduce(self) -> None:
        """Add up the sums of all processes of the default group, in place."""
        torch.distributed.all_reduce(self.sums)

    def compute(self) -> AmodalScores:
        """The means; NaN where nothing counted."""
        full, occluded = (self.sums[:, 0] / self.sums[:, 1]).tolist()
        return AmodalScores(full, occluded)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    return (a & b).sum(1).double() / (a | b).sum(1)
