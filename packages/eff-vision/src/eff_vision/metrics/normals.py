"""Surface normals: angles, and the shares below the usual thresholds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class NormalScores(NamedTuple):
    """Angles in degrees over all valid pixels, and shares below thresholds.

    Attributes:
        mean: Mean angle.
        median: Median angle.
        rmse: Root of the mean square angle.
        within_11: Share below 11.25 degrees.
        within_22: Share below 22.5 degrees.
        within_30: Share below 30 degrees.
    """

    mean: float
    median: float
    rmse: float
    within_11: float
    within_22: float
    within_30: float


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angle [...] in radians between vectors [..., 3] of any length: ``2 atan2(|a - b|, |a + b|)`` of the unit vectors.

    This form is exact for small angles, where an arc cosine is not.
    """
    a, b = F.normalize(a.double(), dim=-1), F.normalize(b.double(), dim=-1)
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def normal_metrics(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> NormalScores:
    """Compare normals [..., 3]; ``valid`` is bool [...].

    Raises:
        ValueError: the shapes differ or nothing is valid.
    """
    if prediction.shape != target.shape or prediction.shape[-1] != 3:
        raise ValueError(
            f"normals must be [..., 3] of one shape, got {list(prediction.shape)} and {list(target.shape)}"
        )
    angles = torch.rad2deg(angle_between(prediction, target))
    angles = angles.flatten() if valid is None else angles[valid]
    if not angles.numel():
        raise ValueError("no normal is valid")
    shares = [float((angles < t).double().mean()) for t in (11.25, 22.5, 30.0)]
    return NormalScores(float(angles.mean()), float(angles.median()), float(angles.square().mean().sqrt()), *shares)
