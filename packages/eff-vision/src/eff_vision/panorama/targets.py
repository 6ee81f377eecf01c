"""Targets of the auxiliary tasks, from the picture and its depth alone (section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_vision.geometry import erp_rays
from eff_vision.geometry.sphere import check_erp
from eff_vision.panorama.layers import circular_pad

_GREY = (0.299, 0.587, 0.114)
EDGE = 0.5
"""Length of the Sobel gradient from which on a pixel is an edge."""

# Rows of the result at a time, to bound the memory.
_ROWS = 16


def sobel(maps: Tensor) -> Tensor:
    """Horizontal and vertical Sobel gradients [B, 2, H, W] of [B, 1, H, W], around in width."""
    kernel = maps.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    return F.conv2d(circular_pad(maps, 1, 1), torch.stack((kernel, kernel.T))[:, None])


def image_gradient(image: Tensor) -> Tensor:
    """Sobel gradients [B, 2, H, W] of the grey of pictures [B, 3, H, W] from 0 to 1; zero in the first and last row."""
    grey = (image * image.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
    found = sobel(grey)
    found[..., 0, :] = 0
    found[..., -1, :] = 0
    return found


def edge_distance(gradient: Tensor, *, polar_rows: int = 8) -> Tensor:
    """log(1 + distance to the nearest edge in pixels), [B, 1, H, W], around in width; log(1 + W) where there is none.

    Args:
        gradient: [B, 2, H, W].
        polar_rows: Rows above and below in which nothing counts as an edge.
    """
    height, width = gradient.shape[-2:]
    edges = gradient.norm(dim=1) > EDGE
    rows = min(polar_rows, height // 2)
    edges[:, :rows] = False
    edges[:, height - rows :] = False
    along = _along_rows(edges).to(gradient.dtype) ** 2
    row = torch.arange(height, device=gradient.device)
    lines = []
    for part in row.split(_ROWS):
        down = (part[:, None] - row).to(gradient.dtype) ** 2
        lines.append((along[:, None] + down[None, :, :, None]).amin(2))
    return torch.cat(lines, 1).sqrt().clamp(max=float(width)).log1p()[:, None]


def _along_rows(edges: Tensor) -> Tensor:
    """Columns to the nearest edge of the same row, around; more than the width and height together if it has none."""
    height, width = edges.shape[-2:]
    place = torch.arange(3 * width, device=edges.device)
    none = 4 * (width + height)
    left = torch.where(edges.repeat(1, 1, 3), place, -none).cummax(-1).values
    right = torch.where(edges.repeat(1, 1, 3), place, none).flip(-1).cummin(-1).values.flip(-1)
    return torch.minimum(place - left, right - place)[..., width : 2 * width]


def point_map(distance: Tensor) -> Tensor:
    """Points [B, 3, H, W] of distances along the rays [B, 1, H, W], in the camera's frame."""
    height, width = distance.shape[-2:]
    check_erp(height, width)
    return distance * erp_rays(height, width).movedim(-1, 0).to(distance)


def aux_targets(image: Tensor, distance: Tensor) -> dict[str, Tensor]:
    """All three: "grad", "edge_distance" and "point".

    Args:
        image: Colours from 0 to 1, [B, 3, H, 2H].
        distance: Along the rays, [B, 1, H, 2H]; 0 where unknown, and the point there is 0 too.
    """
    gradient = image_gradient(image)
    return {"grad": gradient, "edge_distance": edge_distance(gradient), "point": point_map(distance)}
