"""The judge's network: which object covers how much of each cell of a picture, and which objects are there whole."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

CELL = 8  # points of the picture a side


class Scores(NamedTuple):
    """What the network says of pictures.

    Attributes:
        cells: Logits of each cell, [batch, objects + 1, h / 8, w / 8]; the last is everything else.
        presence: Logits that an object is there, whole and recognisable, [batch, objects].
    """

    cells: Tensor
    presence: Tensor


class JudgeNetwork(nn.Module):
    """A residual convolutional network on pictures [batch, 3, h, w] with values from 0 to 1.

    Args:
        objects: How many objects it knows.
        width: Channels of the cells, a multiple of 32.
        depth: Residual blocks on the cells.
    """

    def __init__(self, objects: int, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_step(3, width // 4), *_step(width // 4, width // 2), *_step(width // 2, width), _Block(width)
        )
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth - 1)))
        self.cells = nn.Conv2d(width, objects + 1, 1)
        self.presence = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.GELU())
        self.decide = nn.Linear(2 * width, objects)

    def forward(self, pictures: Tensor) -> Scores:
        """Judge pictures; sides must be multiples of 8."""
        features = self.blocks(self.stem(pictures * 2 - 1))
        strongest = F.adaptive_max_pool2d(self.presence(features), 1).flatten(1)
        return Scores(self.cells(features), self.decide(strongest))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.change(x)
        return x + changed


def _step(inside: int, outside: int) -> tuple[nn.Module, ...]:
    """Half the resolution."""
    return nn.Conv2d(inside, outside, 4, stride=2, padding=1), nn.GroupNorm(8, outside), nn.GELU()
