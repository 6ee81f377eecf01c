"""Rotations, poses and unprojection. Conventions: `eff_embedded.scenes`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Vec3 = tuple[float, float, float]
Vector = Sequence[float] | Array


def rotation_from_vector(vector: Vector) -> Array:
    """Rotation matrix [3, 3] about the axis ``vector`` by its length in radians (Rodrigues)."""
    v = np.asarray(vector, dtype=np.float64)
    angle = float(np.linalg.norm(v))
    if angle == 0.0:
        return np.eye(3)
    x, y, z = v / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + math.sin(angle) * cross + (1.0 - math.cos(angle)) * (cross @ cross)


def rotation_from_angles(yaw: float, pitch: float, roll: float = 0.0) -> Array:
    """Camera-to-world rotation [3, 3]: ``yaw`` turns to the right, ``pitch`` up, ``roll`` clockwise; in degrees."""
    yaw, pitch, roll = (math.radians(a) for a in (yaw, pitch, roll))
    turn, tilt, spin = ((0.0, yaw, 0.0), (pitch, 0.0, 0.0), (0.0, 0.0, roll))
    return rotation_from_vector(turn) @ rotation_from_vector(tilt) @ rotation_from_vector(spin)


def look_at(eye: Vector, target: Vector) -> Array:
    """World-to-camera matrix [4, 4] of a camera at ``eye`` that looks at ``target`` with its picture upright.

    Raises:
        ValueError: the target is at the eye, or right above or below it, where upright means nothing.
    """
    position = np.asarray(eye, dtype=np.float64)
    forward = np.asarray(target, dtype=np.float64) - position
    right = np.cross((0.0, 1.0, 0.0), forward)
    if np.linalg.norm(right) < 1e-9 * max(1.0, float(np.linalg.norm(forward))):
        raise ValueError(
            f"target {tuple(target)} is straight above or below the eye {tuple(eye)}; use Camera.level with a pitch"
        )
    forward, right = forward / np.linalg.norm(forward), right / np.linalg.norm(right)
    return world_to_camera(position, np.stack([right, np.cross(forward, right), forward], axis=1))


def world_to_camera(position: Vector, camera_to_world: Array) -> Array:
    """World-to-camera matrix [4, 4] of a camera at ``position`` with the axes in the columns of ``camera_to_world``."""
    matrix = np.eye(4)
    matrix[:3, :3] = camera_to_world.T
    matrix[:3, 3] = -camera_to_world.T @ np.asarray(position, dtype=np.float64)
    return matrix


def pixel_grid(height: int, width: int, *, like: Tensor) -> Tensor:
    """Picture coordinates (u, v) of pixel centres, [2, height, width], with the dtype and device of ``like``."""
    v, u = torch.meshgrid(
        torch.arange(height, dtype=like.dtype, device=like.device) + 0.5,
        torch.arange(width, dtype=like.dtype, device=like.device) + 0.5,
        indexing="ij",
    )
    return torch.stack([u, v])


def unproject_depth(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor | None = None) -> Tensor:
    """World points of a z-depth map of a pinhole camera.

    Args:
        depth: [..., H, W], in metres along the optical axis.
        intrinsics: [..., 3, 3], in pixels.
        extrinsics: World to camera, [..., 4, 4]. None: the points stay in the frame of the camera.

    Returns:
        [..., 3, H, W], in the dtype of ``depth``.
    """
    height, width = depth.shape[-2:]
    u, v = pixel_grid(height, width, like=depth)
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    points = torch.stack([(u - cx) / fx * depth, (v - cy) / fy * depth, depth], dim=-3)
    if extrinsics is None:
        return points
    moved = points.flatten(-2) - extrinsics[..., :3, 3:]
    return (extrinsics[..., :3, :3].transpose(-1, -2) @ moved).view(points.shape)


def project_points(points: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Where a pinhole camera sees world points.

    Args:
        points: [..., 3, N] or [..., 3, H, W].
        intrinsics: [..., 3, 3], in pixels.
        extrinsics: World to camera, [..., 4, 4].

    Returns:
        Picture coordinates [..., 2, N] (or H, W), and z-depths [..., N]: where these are not positive the point is
        behind the camera and the coordinates mean nothing.
    """
    lead = extrinsics.dim() - 2
    seen = extrinsics[..., :3, :3] @ points.flatten(lead + 1) + extrinsics[..., :3, 3:]
    picture = (intrinsics @ seen)[..., :2, :] / seen[..., 2:, :]
    return picture.unflatten(-1, points.shape[lead + 1 :]), seen[..., 2, :].unflatten(-1, points.shape[lead + 1 :])
