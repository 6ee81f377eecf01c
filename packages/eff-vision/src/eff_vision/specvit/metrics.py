"""Overall accuracy, average accuracy and kappa."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from eff_vision.metrics import ConfusionMatrix


class HsiScores(NamedTuple):
    """Scores of a classification.

    Attributes:
        oa: Share of pixels that are right.
        aa: Mean of the classes' accuracies; classes without a true pixel do not count.
        kappa: Cohen's kappa.
        per_class: Accuracy of each class; NaN without a true pixel.
        confusion: Counts of (true, predicted).
    """

    oa: float
    aa: float
    kappa: float
    per_class: Tensor
    confusion: Tensor


def oa_aa_kappa(target: Tensor, prediction: Tensor, num_classes: int) -> HsiScores:
    """Scores of classes from 0 on."""
    matrix = ConfusionMatrix(num_classes, ignore_index=None)
    matrix.update(prediction, target)
    per_class = matrix.class_accuracy
    return HsiScores(matrix.accuracy, float(per_class.nanmean()), matrix.kappa, per_class, matrix.counts)
