"""Pre-training the dense part of a detector too: a feature pyramid, with the loss on each level (section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Lateral 1 x 1 convolutions, a path from the top down, a 3 x 3 convolution on each level (Lin and others, 2017).

    Args:
        channels: Of the backbone's maps, finest first.
        dim: Of all levels of the pyramid.
        tower: 3 x 3 convolutions with ReLU after each level, shared by the levels, as in dense heads.
    """

    def __init__(self, channels: Sequence[int], dim: int = 256, *, tower: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        self.tower = nn.Sequential(
            *(part for _ in range(tower) for part in (nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU()))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The levels, finest first, each with ``dim`` channels and the size of its map."""
        if len(maps) != len(self.lateral):
            raise ValueError(f"the pyramid takes {len(self.lateral)} maps, got {len(maps)}")
        levels: list[Tensor] = []
        above: Tensor | None = None
        for lateral, smooth, x in reversed(list(zip(self.lateral, self.smooth, maps, strict=True))):
            here = lateral(x)
            if above is not None:
                here = here + F.interpolate(above, size=here.shape[-2:], mode="nearest")
            above = here
            levels.insert(0, self.tower(smooth(here)))
        return levels
