"""The pixel propagation module: each cell becomes a mixture of the cells of its map that resemble it (section 3.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PixelPropagation(nn.Module):
    """``y_i = sum_j max(cos(x_i, x_j), 0)^gamma g(x_j)``, with g of unit length.

    Args:
        dim: Features of a cell.
        gamma: Sharpness, positive.
        layers: 1 x 1 convolutions of g: 0 is the identity, 2 has batch norm and ReLU between them.
    """

    def __init__(self, dim: int, *, gamma: float = 2.0, layers: int = 1) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        if layers not in (0, 1, 2):
            raise ValueError(f"layers must be 0, 1 or 2, got {layers}")
        self.gamma = gamma
        self.transform: nn.Module = nn.Identity()
        if layers == 1:
            self.transform = nn.Conv2d(dim, dim, 1)
        elif layers == 2:
            self.transform = nn.Sequential(
                nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, dim, 1)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Propagate a map [B, d, H, W]; the result has the same shape and is not normalised."""
        unit = F.normalize(x.flatten(2), dim=1)
        similarity = (unit.mT @ unit).clamp_min(0)
        if self.gamma < 1:  # the slope of a root is infinite at 0
            similarity = similarity.clamp_min(1e-6)
        values = F.normalize(self.transform(x).flatten(2), dim=1)
        return (values @ similarity**self.gamma).view_as(x)  # similarity is symmetric
