"""Which cells of two crops show the same place.

A crop is ``(x0, y0, x1, y1)``: its left, upper, right and lower edges in the picture, as shares of its width and
height. A flipped crop has x0 > x1. Edges, not pixel centres: the official code counts to the last pixel's index, which
leaves every cell half a pixel off.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 1e-9
"""Distances within this of the threshold count as beyond it, so that ties do not depend on rounding."""


def cell_centres(crops: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Centres [B, H * W, 2] of the cells (x, y) in the picture, and the diagonal [B] of a cell, in float64.

    Args:
        crops: [B, 4].
        grid: Rows and columns of cells.

    Raises:
        ValueError: crops are not [B, 4], or one is empty.
    """
    if crops.ndim != 2 or crops.size(1) != 4:
        raise ValueError(f"crops must be [B, 4], got {list(crops.shape)}")
    height, width = grid
    x0, y0, x1, y1 = crops.double()[:, :, None].unbind(1)
    if bool(((x1 == x0) | (y1 == y0)).any()):
        raise ValueError("a crop is empty: two of its edges are the same")
    u = (torch.arange(width, device=crops.device) + 0.5) / width
    v = (torch.arange(height, device=crops.device) + 0.5) / height
    x, y = x0 + u * (x1 - x0), y0 + v * (y1 - y0)
    centres = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), -1)
    return centres.flatten(1, 2), torch.hypot((x1 - x0) / width, (y1 - y0) / height).squeeze(1)


def positive_mask(
    crops_a: Tensor,
    crops_b: Tensor,
    grid_a: tuple[int, int],
    grid_b: tuple[int, int] | None = None,
    *,
    threshold: float = 0.7,
) -> Tensor:
    """Pairs of cells nearer than ``threshold`` of the larger diagonal, bool [B, Ha * Wa, Hb * Wb] (section 3.1)."""
    a, diagonal_a = cell_centres(crops_a, grid_a)
    b, diagonal_b = cell_centres(crops_b, grid_b or grid_a)
    return torch.cdist(a, b) / torch.maximum(diagonal_a, diagonal_b)[:, None, None] < threshold - TIE
