"""Camera poses: angles of rotation and translation over pairs of views, and the area under their curve."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_vision.geometry.poses import relative_poses, rotation_angle
from eff_vision.metrics.normals import angle_between


class PoseScores(NamedTuple):
    """Scores of one set of views.

    Attributes:
        rotation: Mean rotation error against the reference view, in degrees, the reference itself left out.
        translation: Mean distance of camera translations after the best single scale, in the truth's unit.
        rra: Share of pairs whose relative rotation is within the threshold.
        rta: Share of pairs whose direction of relative translation is within the threshold.
        auc: Area under the share of pairs with both errors below a limit, limits from 1 degree to the threshold.
    """

    rotation: float
    translation: float
    rra: float
    rta: float
    auc: float


def pose_metrics(prediction: Tensor, target: Tensor, *, threshold: float = 30.0, reference: int = 0) -> PoseScores:
    """Compare poses (world to camera) [S, 3, 4] of S >= 2 views, each set in the frame of its reference view.

    Raises:
        ValueError: the shapes differ or there are fewer than two views.
    """
    if prediction.shape != target.shape or prediction.ndim != 3 or prediction.size(0) < 2:
        raise ValueError(
            f"wanted two sets of poses [S >= 2, 3, 4] of one shape, got {list(prediction.shape)} and "
            f"{list(target.shape)}"
        )
    p, g = relative_poses(prediction.double(), reference), relative_poses(target.double(), reference)
    others = [i for i in range(len(p)) if i != reference]
    rotation = torch.rad2deg(rotation_angle(p[others, :, :3], g[others, :, :3])).mean()
    moved, true = p[others, :, 3], g[others, :, 3]
    scale = (moved * true).sum() / moved.square().sum().clamp_min(1e-12)
    translation = (scale * moved - true).norm(dim=-1).mean()
    angles = torch.tensor([_pair(p, g, i, j) for i in range(len(p)) for j in range(i)])
    worst = angles.amax(1)
    limits = torch.arange(1, int(threshold) + 1)
    auc = (worst[:, None] < limits).double().mean()
    within = (angles < threshold).double().mean(0)
    return PoseScores(float(rotation), float(translation), float(within[0]), float(within[1]), float(auc))


def _pair(p: Tensor, g: Tensor, i: int, j: int) -> tuple[float, float]:
    a, b = (relative_poses(poses[[j, i]])[1] for poses in (p, g))
    angle = torch.rad2deg(rotation_angle(a[:, :3], b[:, :3]))
    if float(b[:, 3].norm()) < 1e-9:  # two cameras in one place have no direction between them
        return float(angle), 0.0
    return float(angle), float(torch.rad2deg(angle_between(a[:, 3], b[:, 3])))


def umeyama(source: Tensor, target: Tensor, *, with_scale: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, rotation [3, 3] and translation [3] that bring points [N, 3] onto others with least squares.

    S. Umeyama, Least-squares estimation of transformation parameters between two point patterns, 1991, eqs. 40 to 43.

    Raises:
        ValueError: fewer than three points, or shapes that differ.
    """
    if source.shape != target.shape or source.ndim != 2 or source.size(0) < 3:
        raise ValueError(f"wanted two sets of at least three points, got {list(source.shape)} and {list(target.shape)}")
    x, y = source.double(), target.double()
    mx, my = x.mean(0), y.mean(0)
    u, s, vh = torch.linalg.svd((y - my).T @ (x - mx) / len(x))
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation = u @ torch.diag(sign) @ vh
    spread = (x - mx).square().sum(1).mean()
    scale = (s * sign).sum() / spread if with_scale else torch.ones((), dtype=torch.float64)
    return scale, rotation, my - scale * rotation @ mx
