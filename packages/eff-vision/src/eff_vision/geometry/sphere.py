"""Equirectangular panoramas (ERP) and the perspective pictures cut out of them. Conventions: `eff_vision.geometry`.

All resampling is differentiable in the picture. Panoramas wrap around sideways, and beyond a pole they continue on its
other side.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_vision.geometry.cameras import intrinsics_from_fov, pixel_rays

Mode = Literal["bilinear", "nearest"]


def erp_angles(height: int, width: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Longitude [width] and latitude [height] of the pixel centres, in radians.

    Raises:
        ValueError: the width is not twice the height.
    """
    check_erp(height, width)
    longitude = 2 * math.pi * (torch.arange(width, dtype=dtype) + 0.5) / width - math.pi
    latitude = math.pi / 2 - math.pi * (torch.arange(height, dtype=dtype) + 0.5) / height
    return longitude, latitude


def erp_rays(height: int, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit directions of the pixel centres, [height, width, 3]."""
    longitude, latitude = erp_angles(height, width, dtype=dtype)
    theta, phi = longitude[None, :], latitude[:, None]
    x, y, z = phi.cos() * theta.sin(), -phi.sin() * torch.ones_like(theta), phi.cos() * theta.cos()
    return torch.stack((x, y, z), -1)


def erp_area_weights(height: int, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Share of the sphere that each pixel covers, [height, width], exact, sum 1."""
    check_erp(height, width)
    borders = torch.sin(math.pi / 2 - math.pi * torch.arange(height + 1, dtype=torch.float64) / height)
    rows = (borders[:-1] - borders[1:]) / (2 * width)
    return rows[:, None].expand(height, width).to(dtype).contiguous()


def rotation_from_yaw_pitch(yaw: Tensor | float, pitch: Tensor | float) -> Tensor:
    """Camera to world [..., 3, 3] in float32 of a camera turned right by ``yaw``, then up by ``pitch``, in radians."""
    y, p = torch.broadcast_tensors(
        torch.as_tensor(yaw, dtype=torch.float64), torch.as_tensor(pitch, dtype=torch.float64)
    )
    zero, one = torch.zeros_like(y), torch.ones_like(y)
    turn = torch.stack((y.cos(), zero, y.sin(), zero, one, zero, -y.sin(), zero, y.cos()), -1).unflatten(-1, (3, 3))
    lift = torch.stack((one, zero, zero, zero, p.cos(), -p.sin(), zero, p.sin(), p.cos()), -1).unflatten(-1, (3, 3))
    return (turn @ lift).float()


def erp_to_perspective(
    panorama: Tensor, rotation: Tensor, fov: float, height: int, width: int, *, mode: Mode = "bilinear"
) -> Tensor:
    """Cut perspective pictures out of panoramas.

    Args:
        panorama: [B, C, H, 2H].
        rotation: Camera to world, [B, 3, 3] or [3, 3], as `rotation_from_yaw_pitch` gives.
        fov: Horizontal field of view in radians, below pi.
        height: Rows of the picture.
        width: Columns of the picture.
        mode: "nearest" for labels.

    Returns:
        [B, C, height, width] in the panorama's dtype.
    """
    _check_panorama(panorama)
    rays = pixel_rays(intrinsics_from_fov(float(fov), height, width).double(), height, width)
    world = rays @ _batch(rotation, panorama.size(0)).double().mT[:, None]
    return sample_erp(panorama, world, mode=mode)


def sample_erp(panorama: Tensor, directions: Tensor, *, mode: Mode = "bilinear") -> Tensor:
    """Values [B, C, h, w] of panoramas [B, C, H, 2H] in directions [B, h, w, 3] of any length."""
    _check_panorama(panorama)
    height, width = panorama.shape[-2:]
    x, y, z = directions.unbind(-1)
    longitude = torch.atan2(x, z)
    latitude = torch.atan2(-y, torch.hypot(x, z))
    column = (longitude + math.pi) * width / (2 * math.pi)  # in [0, width], pixel centres at halves
    row = (math.pi / 2 - latitude) * height / math.pi
    padded = pad_erp(panorama, 1)
    # grid_sample without align_corners: -1 is the left border of the first pixel, 1 the right border of the last.
    grid = torch.stack((2 * (column + 1) / (width + 2) - 1, 2 * (row + 1) / (height + 2) - 1), -1)
    floats = padded if padded.is_floating_point() else padded.double()
    sampled = F.grid_sample(floats, grid.to(floats.dtype), mode=mode, padding_mode="border", align_corners=False)
    return sampled.to(panorama.dtype)


def pad_erp(panorama: Tensor, pad: int) -> Tensor:
    """Add ``pad`` pixels on all sides of [..., H, W]: around sideways, and across the poles half a turn away.

    Raises:
        ValueError: the padding is larger than the panorama is high.
    """
    height, width = panorama.shape[-2:]
    if not 0 <= pad <= min(height, width):
        raise ValueError(f"pad must be from 0 to {min(height, width)}, got {pad}")
    if pad == 0:
        return panorama
    across = panorama.roll(width // 2, -1)
    tall = torch.cat((across[..., :pad, :].flip(-2), panorama, across[..., -pad:, :].flip(-2)), -2)
    return torch.cat((tall[..., -pad:], tall, tall[..., :pad]), -1)


def perspective_to_erp(
    picture: Tensor, rotation: Tensor, fov: float, erp_height: int, *, mode: Mode = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Lay perspective pictures onto panoramas.

    Args:
        picture: [B, C, h, w].
        rotation: Camera to world, [B, 3, 3] or [3, 3].
        fov: Horizontal field of view in radians.
        erp_height: Rows of the panorama, which is twice as wide.
        mode: "nearest" for labels.

    Returns:
        The panorama [B, C, H, 2H], zero where the picture does not reach, and the mask [B, H, 2H] of where it does.
    """
    if picture.ndim != 4:
        raise ValueError(f"pictures must be [B, C, h, w], got {list(picture.shape)}")
    batch, _, height, width = picture.shape
    rays = erp_rays(erp_height, 2 * erp_height, dtype=torch.float64)
    camera = rays @ _batch(rotation, batch).double()[:, None]  # rows times R: the transpose is the inverse
    k = intrinsics_from_fov(float(fov), height, width).double()
    z = camera[..., 2]
    ahead = z > 1e-9
    safe = torch.where(ahead, z, torch.ones_like(z))
    column = camera[..., 0] / safe * k[0, 0] + k[0, 2]
    row = camera[..., 1] / safe * k[1, 1] + k[1, 2]
    mask = ahead & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    grid = torch.stack((2 * column / width - 1, 2 * row / height - 1), -1)
    grid = torch.where(mask[..., None], grid, torch.zeros_like(grid))
    floats = picture if picture.is_floating_point() else picture.double()
    sampled = F.grid_sample(floats, grid.to(floats.dtype), mode=mode, padding_mode="border", align_corners=False)
    return torch.where(mask[:, None], sampled, torch.zeros_like(sampled)).to(picture.dtype), mask


def check_erp(height: int, width: int) -> None:
    """Raise ValueError unless a panorama of this size is whole: twice as wide as high."""
    if height < 1 or width != 2 * height:
        raise ValueError(f"an equirectangular panorama is twice as wide as high, got {height} x {width}")


def _check_panorama(panorama: Tensor) -> None:
    if panorama.ndim != 4:
        raise ValueError(f"panoramas must be [B, C, H, W], got {list(panorama.shape)}")
    check_erp(*panorama.shape[-2:])


def _batch(rotation: Tensor, batch: int) -> Tensor:
    if rotation.shape[-2:] != (3, 3) or rotation.ndim not in (2, 3):
        raise ValueError(f"rotation must be [3, 3] or [B, 3, 3], got {list(rotation.shape)}")
    return rotation.expand(batch, 3, 3)
