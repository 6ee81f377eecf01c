"""Cameras as nine numbers. Conventions: `eff_vision.geometry`."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_vision.geometry.cameras import fov_from_intrinsics
from eff_vision.geometry.poses import check_pose, matrix_to_quaternion, quaternion_to_matrix


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Nine numbers for a camera [..., 9]: translation, quaternion (x, y, z, w >= 0), vertical and horizontal fov.

    The encoding of VGGT (arXiv 2503.11651, section 3.1); the principal point is taken to be in the middle.
    """
    check_pose(extrinsics)
    vertical, horizontal = fov_from_intrinsics(intrinsics, height, width)
    quaternion = matrix_to_quaternion(extrinsics[..., :3, :3])
    return torch.cat((extrinsics[..., :3, 3], quaternion, vertical[..., None], horizontal[..., None]), -1)


def decode_pose(code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Extrinsics [..., 3, 4] and intrinsics [..., 3, 3] of what `encode_pose` gave; either sign of the quaternion."""
    if code.shape[-1] != 9:
        raise ValueError(f"a pose code has 9 numbers, got {list(code.shape)}")
    extrinsics = torch.cat((quaternion_to_matrix(code[..., 3:7]), code[..., :3, None]), -1)
    k = torch.zeros(*code.shape[:-1], 3, 3, dtype=code.dtype, device=code.device)
    k[..., 0, 0] = width / (2 * torch.tan(code[..., 8] / 2))
    k[..., 1, 1] = height / (2 * torch.tan(code[..., 7] / 2))
    k[..., 0, 2], k[..., 1, 2], k[..., 2, 2] = width / 2, height / 2, 1
    return extrinsics, k
