"""Point clouds: distances to the nearest neighbour both ways."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PointScores(NamedTuple):
    """Scores of one pair of clouds.

    Attributes:
        accuracy: Mean distance from the prediction to the truth.
        completeness: Mean distance from the truth to the prediction.
        chamfer: Mean of the two means, of plain distances.
        chamfer_squared: Mean of the two means of squared distances.
        precision: Share of the prediction within the threshold of the truth.
        recall: Share of the truth within the threshold of the prediction.
        fscore: Harmonic mean of both, 0 if both are 0.
    """

    accuracy: float
    completeness: float
    chamfer: float
    chamfer_squared: float
    precision: float
    recall: float
    fscore: float


def point_metrics(prediction: Tensor, target: Tensor, *, threshold: float = 0.05, chunk: int = 2048) -> PointScores:
    """Compare clouds [N, 3] and [M, 3] by brute force, ``chunk`` points at a time.

    Raises:
        ValueError: a cloud is empty, not [N, 3] or not finite.
    """
    for name, cloud in (("prediction", prediction), ("target", target)):
        if cloud.ndim != 2 or cloud.size(1) != 3 or not cloud.size(0) or not bool(cloud.isfinite().all()):
            raise ValueError(f"{name} must be finite points [N >= 1, 3], got {list(cloud.shape)}")
    there, back = _nearest(prediction, target, chunk), _nearest(target, prediction, chunk)
    precision, recall = float((there < threshold).double().mean()), float((back < threshold).double().mean())
    fscore = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return PointScores(
        accuracy=float(there.mean()),
        completeness=float(back.mean()),
        chamfer=float((there.mean() + back.mean()) / 2),
        chamfer_squared=float((there.square().mean() + back.square().mean()) / 2),
        precision=precision,
        recall=recall,
        fscore=fscore,
    )


def _nearest(a: Tensor, b: Tensor, chunk: int) -> Tensor:
    b = b.double()
    return torch.cat([torch.cdist(part.double(), b).amin(1) for part in a.split(chunk)])
