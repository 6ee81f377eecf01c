"""Pinhole cameras: rays, projection and depth. Conventions: `eff_vision.geometry`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eff_vision.geometry.poses import invert_pose, transform_points


def pixel_grid(
    height: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Pixel centres (x, y), [height, width, 2]: the first is (0.5, 0.5).

    Raises:
        ValueError: a size is not positive.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture needs at least one pixel, got {height} x {width}")
    y = torch.arange(height, dtype=dtype, device=device) + 0.5
    x = torch.arange(width, dtype=dtype, device=device) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def intrinsics_from_fov(fov: Tensor | float, height: int, width: int) -> Tensor:
    """Intrinsics [..., 3, 3] with square pixels, centre in the middle, from the horizontal field of view in radians.

    Raises:
        ValueError: a field of view is not between 0 and pi.
    """
    angle = torch.as_tensor(fov, dtype=torch.get_default_dtype() if isinstance(fov, float | int) else None)
    if not bool(((angle > 0) & (angle < math.pi)).all()):
        raise ValueError(f"a field of view must be between 0 and pi radians, got {angle.flatten()[:4].tolist()}")
    focal = width / (2 * torch.tan(angle / 2))
    k = torch.zeros(*angle.shape, 3, 3, dtype=angle.dtype, device=angle.device)
    k[..., 0, 0] = k[..., 1, 1] = focal
    k[..., 0, 2], k[..., 1, 2], k[..., 2, 2] = width / 2, height / 2, 1
    return k


def fov_from_intrinsics(intrinsics: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Vertical and horizontal field of view [...] in radians, of a camera whose centre is in the middle."""
    return 2 * torch.atan(height / (2 * intrinsics[..., 1, 1])), 2 * torch.atan(width / (2 * intrinsics[..., 0, 0]))


def pixel_rays(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Directions through all pixel centres with z = 1, in the camera's frame, [..., height, width, 3].

    Args:
        intrinsics: [..., 3, 3], without skew.
        height: Rows.
        width: Columns.

    Raises:
        ValueError: a focal length is not positive.
    """
    check_intrinsics(intrinsics)
    grid = pixel_grid(height, width, dtype=intrinsics.dtype, device=intrinsics.device)
    focal = torch.stack((intrinsics[..., 0, 0], intrinsics[..., 1, 1]), -1)[..., None, None, :]
    centre = intrinsics[..., :2, 2][..., None, None, :]
    xy = (grid - centre) / focal
    return torch.cat((xy, torch.ones_like(xy[..., :1])), -1)


def unproject(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor | None = None) -> Tensor:
    """Points [..., H, W, 3] of a map of z-depth [..., H, W]: in the world, or in the camera without ``extrinsics``.

    Args:
        depth: z-depth in any unit of length.
        intrinsics: [..., 3, 3].
        extrinsics: World to camera, [..., 3, 4] or [..., 4, 4].
    """
    points = pixel_rays(intrinsics, *depth.shape[-2:]) * depth[..., None]
    if extrinsics is None:
        return points
    flat = transform_points(invert_pose(extrinsics), points.flatten(-3, -2))
    return flat.unflatten(-2, depth.shape[-2:])


def project(points: Tensor, intrinsics: Tensor, extrinsics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pixel coordinates [..., N, 2] and z-depth [..., N] of points [..., N, 3]; depth <= 0 is behind the camera.

    Points in the camera's plane have no picture: their coordinates are infinite or NaN.
    """
    check_intrinsics(intrinsics)
    if extrinsics is not None:
        points = transform_points(extrinsics, points)
    z = points[..., 2]
    focal = torch.stack((intrinsics[..., 0, 0], intrinsics[..., 1, 1]), -1)[..., None, :]
    return points[..., :2] / z[..., None] * focal + intrinsics[..., None, :2, 2], z


def z_to_radial(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Distance from the camera [..., H, W] of a map of z-depth."""
    return depth * pixel_rays(intrinsics, *depth.shape[-2:]).norm(dim=-1)


def radial_to_z(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """z-depth [..., H, W] of a map of distances from the camera."""
    return depth / pixel_rays(intrinsics, *depth.shape[-2:]).norm(dim=-1)


def check_intrinsics(intrinsics: Tensor) -> None:
    """Raise ValueError unless these are intrinsics [..., 3, 3] with positive focal lengths."""
    if intrinsics.shape[-2:] != (3, 3):
        raise ValueError(f"intrinsics must be [..., 3, 3], got {list(intrinsics.shape)}")
    focal = torch.stack((intrinsics[..., 0, 0], intrinsics[..., 1, 1]))
    if not bool((focal > 0).all() and focal.isfinite().all()):
        raise ValueError(f"focal lengths must be positive and finite, got {focal.flatten()[:4].tolist()}")
