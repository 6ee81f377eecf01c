"""DPT decoders (Ranftl and others, 2021), with convolutions and resizing that go around the panorama."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from eff_vision.panorama.config import CHANNELS
from eff_vision.panorama.layers import PanoConv2d, resize_panorama
from eff_vision.residual import ResidualUnit


class DPTNeck(nn.Module):
    """Four maps of one size to one map of four times as many rows.

    Args:
        channels: Of the maps.
        dim: Of the result.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(channels, dim, 1) for _ in range(4))
        self.down = PanoConv2d(dim, dim, 3, stride=2)
        self.units = nn.ModuleList(ResidualUnit(lambda: PanoConv2d(dim, dim, 3)) for _ in range(8))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """[B, dim, 8 h, 8 w] of maps [B, channels, h, w]."""
        rows, columns = maps[0].shape[-2:]
        found = [project(m) for project, m in zip(self.project, maps, strict=True)]
        levels = [
            resize_panorama(found[0], 4 * rows, 4 * columns),
            resize_panorama(found[1], 2 * rows, 2 * columns),
            found[2],
            self.down(found[3]),
        ]
        x = self.units[7](self.units[6](levels[3]))
        for i in (2, 1, 0):
            level = self.units[2 * i](levels[i])
            x = self.units[2 * i + 1](level + resize_panorama(x, *level.shape[-2:]))
        return resize_panorama(x, 8 * rows, 8 * columns)


class TaskDecoder(nn.Module):
    """Neck and head of one main task: maps of the backbone's size in, the prediction at the picture's size out.

    Depth is not negative. Normals are not normalised: loss and metrics do that.
    """

    def __init__(self, task: str, channels: int, dim: int, classes: int) -> None:
        super().__init__()
        self.task = task
        self.neck = DPTNeck(channels, dim)
        outputs = classes if task == "semseg" else CHANNELS[task]
        half, quarter = dim // 2, max(8, dim // 8)
        self.first, self.second = PanoConv2d(dim, half, 3), PanoConv2d(half, quarter, 3)
        self.last = nn.Conv2d(quarter, outputs, 1)
        if task == "depth" and self.last.bias is not None:
            # Behind a rectifier: a start below zero would never learn.
            nn.init.ones_(self.last.bias)

    def forward(self, maps: list[Tensor], height: int, width: int) -> Tensor:
        """[B, outputs, height, width]."""
        x = self.first(self.neck(maps))
        x = self.last(F.relu(self.second(resize_panorama(x, height, width))))
        return F.relu(x) if self.task == "depth" else x
