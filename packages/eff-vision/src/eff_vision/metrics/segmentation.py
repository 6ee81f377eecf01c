"""Segmentation from one confusion matrix: exact whatever the batches and the ranks."""

from __future__ import annotations

import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (true class, predicted class), added up over batches.

    Args:
        num_classes: Number of classes.
        ignore_index: Label of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of class indices of any equal shape.

        Raises:
            ValueError: the shapes differ, or a class is outside the range.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} must have one shape")
        n = self.counts.size(0)
        target, prediction = target.flatten().long().cpu(), prediction.flatten().long().cpu()
        if self.ignore_index is not None:
            keep = target != self.ignore_index
            target, prediction = target[keep], prediction[keep]
        for name, values in (("target", target), ("prediction", prediction)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < n:
                raise ValueError(f"{name} has classes {int(values.min())} to {int(values.max())}; wanted 0 to {n - 1}")
        self.counts += torch.bincount(target * n + prediction, minlength=n * n).view(n, n)

    def reduce(self) -> None:
        """Add up the counts of all processes of the default group, in place."""
        torch.distributed.all_reduce(self.counts)

    @property
    def accuracy(self) -> float:
        """Share of pixels that are right; NaN without pixels."""
        return float(self.counts.diagonal().sum() / self.counts.sum())

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 [num_classes]; NaN for a class that neither side has."""
        hits = self.counts.diagonal().double()
        union = self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        return hits / union

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that appear in the truth or the prediction."""
        return float(self.iou.nanmean())

    @property
    def class_accuracy(self) -> Tensor:
        """Share of each true class that is found, float64 [num_classes]; NaN for classes without pixels."""
        return self.counts.diagonal().double() / self.counts.sum(1)

    @property
    def kappa(self) -> float:
        """Cohen's kappa: agreement beyond what the class frequencies alone give."""
        total = self.counts.sum().double()
        agreed = self.counts.diagonal().sum() / total
        chance = (self.counts.sum(0).double() @ self.counts.sum(1).double()) / total**2
        return float((agreed - chance) / (1 - chance))
