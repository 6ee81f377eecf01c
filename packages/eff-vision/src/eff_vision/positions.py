"""Position codes of a grid of patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_position(height: int, width: int, dim: int, *, temperature: float = 10_000.0) -> Tensor:
    """DETR's two-dimensional sine code, [height * width, dim]: first half for the row, second half for the column.

    Rows and columns are numbered from 1 and scaled so that the last is 2 pi (Carion and others, 2020).

    Raises:
        ValueError: ``dim`` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4, got {dim}")
    index = torch.arange(dim // 2, dtype=torch.float64)
    period = temperature ** (2 * (index // 2) / (dim // 2))

    def code(count: int) -> Tensor:
        place = torch.arange(1, count + 1, dtype=torch.float64) / (count + 1e-6) * 2 * math.pi
        angle = place[:, None] / period
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), -1).flatten(1)

    rows = code(height)[:, None].expand(height, width, -1)
    columns = code(width)[None].expand(height, width, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1).float()
