"""Codes of places whose cosine falls off with distance as a Gaussian."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn


def gaussian_position_table(n: int, dim: int, sigma: float = 2.0) -> Tensor:
    """Unit vectors [n, dim] with ``cos(P_i, P_j) = exp(-(i - j)^2 / (2 sigma^2))``, exact, in float64.

    The official table is fitted by gradient descent; the Gaussian kernel is positive semi-definite, so its
    eigen-decomposition gives it in closed form.

    Raises:
        ValueError: ``dim`` is below ``n``, or sigma is not positive.
    """
    if dim < n:
        raise ValueError(f"an exact table of {n} places needs dim >= {n}, got {dim}")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    place = torch.arange(n, dtype=torch.float64)
    kernel = torch.exp(-((place[:, None] - place[None]) ** 2) / (2 * sigma**2))
    values, vectors = torch.linalg.eigh(kernel)
    table = vectors * values.clamp_min(0).sqrt()
    return torch.cat((table, torch.zeros(n, dim - n, dtype=torch.float64)), 1)


class DistancePositionEncoding2D(nn.Module):
    """Codes of rows and columns side by side, [..., dim].

    Args:
        dim: Features, even.
        mode: "grid" for whole numbers from 0 to ``max_grid - 1`` (exact), "continuous" for any place (random Fourier
            features of the Gaussian, whose cosines are right on average), "sine" for the ordinary code.
        sigma: Width of the Gaussian.
        max_grid: Places of a row or column in grid mode.
        seed: Of the random features.
    """

    table: Tensor
    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        *,
        mode: Literal["grid", "continuous", "sine"] = "grid",
        sigma: float = 2.0,
        max_grid: int = 14,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must be divisible by 4, got {dim}")
        self.mode, self.axis_dim = mode, dim // 2
        if mode == "grid":
            self.register_buffer("table", gaussian_position_table(max_grid, self.axis_dim, sigma).float())
        elif mode == "continuous":
            generator = torch.Generator().manual_seed(seed)
            self.register_buffer("frequencies", torch.randn(2, self.axis_dim // 2, generator=generator) / sigma)
        elif mode == "sine":
            self.register_buffer("frequencies", 10_000.0 ** (-torch.arange(0, self.axis_dim, 2) / self.axis_dim))
        else:
            raise ValueError(f"mode must be 'grid', 'continuous' or 'sine', got {mode!r}")

    def forward(self, places: Tensor) -> Tensor:
        """Codes [..., dim] of places [..., 2] (row, column).

        Raises:
            ValueError: a place is outside of the table.
        """
        if places.shape[-1] != 2:
            raise ValueError(f"places must be [..., 2], got {list(places.shape)}")
        if self.mode == "grid":
            index = places.long()
            n = self.table.size(0)
            if not torch.compiler.is_exporting() and bool(((index < 0) | (index >= n)).any()):
                raise ValueError(f"places must be from 0 to {n - 1}, got {int(index.min())} to {int(index.max())}")
            return self.table[index].flatten(-2)
        axes = places.float().unbind(-1)
        frequencies = [self.frequencies[i] if self.mode == "continuous" else self.frequencies for i in (0, 1)]
        angles = [x[..., None] * f for x, f in zip(axes, frequencies, strict=True)]
        scale = math.sqrt(2 / self.axis_dim)
        return torch.cat([torch.cat((a.sin(), a.cos()), -1) * scale for a in angles], -1)
