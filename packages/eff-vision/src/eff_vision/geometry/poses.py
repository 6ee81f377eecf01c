"""Rotations and rigid motions. A pose is world to camera, [..., 3, 4] or [..., 4, 4]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_pose(pose: Tensor) -> None:
    """Raise ValueError unless this is [..., 3, 4] or [..., 4, 4] and finite."""
    if pose.shape[-2:] not in ((3, 4), (4, 4)):
        raise ValueError(f"a pose must be [..., 3, 4] or [..., 4, 4], got {list(pose.shape)}")
    if not bool(pose.isfinite().all()):
        raise ValueError("a pose holds values that are not finite")


def invert_pose(pose: Tensor) -> Tensor:
    """The inverse motion, in the shape that was given: ``(R^T, -R^T t)``."""
    check_pose(pose)
    rotation = pose[..., :3, :3].mT
    inverse = torch.cat((rotation, -rotation @ pose[..., :3, 3:]), -1)
    return torch.cat((inverse, pose[..., 3:, :]), -2)


def transform_points(pose: Tensor, points: Tensor) -> Tensor:
    """Apply a pose [..., 3|4, 4] to points [..., N, 3]."""
    return points @ pose[..., :3, :3].mT + pose[..., None, :3, 3]


def relative_poses(poses: Tensor, reference: int = 0) -> Tensor:
    """Poses [..., S, 3, 4] with the camera ``reference`` as the world's frame: that one becomes the identity."""
    check_pose(poses)
    first = invert_pose(poses[..., reference : reference + 1, :3, :])
    rotation = poses[..., :3, :3] @ first[..., :3, :3]
    translation = poses[..., :3, :3] @ first[..., :3, 3:] + poses[..., :3, 3:]
    return torch.cat((rotation, translation), -1)


def rotation_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle [...] in radians between rotations [..., 3, 3].

    From the chord ``|a - b|_F = 2 sqrt(2) sin(angle / 2)``, which stays exact for small angles, where the arc cosine of
    the trace loses half of the digits.
    """
    chord = (a - b).flatten(-2).norm(dim=-1) / (2 * 2**0.5)
    return 2 * torch.asin(chord.clamp(max=1))


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotations [..., 3, 3] of quaternions [..., 4] in the order x, y, z, w; any length but zero."""
    x, y, z, w = F.normalize(quaternion, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Quaternions [..., 4] (x, y, z, w with w >= 0) of rotations [..., 3, 3].

    Of the four ways to divide, each row takes the one with the largest divisor.
    """
    m = rotation
    trace = m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2]
    squares = torch.stack(
        (
            1 + 2 * m[..., 0, 0] - trace,
            1 + 2 * m[..., 1, 1] - trace,
            1 + 2 * m[..., 2, 2] - trace,
            1 + trace,
        ),
        -1,
    )
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    candidates = torch.stack(
        (
            torch.stack((squares[..., 0], xy, xz, wx), -1),
            torch.stack((xy, squares[..., 1], yz, wy), -1),
            torch.stack((xz, yz, squares[..., 2], wz), -1),
            torch.stack((wx, wy, wz, squares[..., 3]), -1),
        ),
        -2,
    )
    best = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quaternion = F.normalize(candidates.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
