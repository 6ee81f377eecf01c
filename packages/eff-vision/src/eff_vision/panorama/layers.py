"""Convolution and resizing on panoramas: the left and the right border are neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def circular_pad(maps: Tensor, columns: int, rows: int) -> Tensor:
    """Maps [B, C, H, W] with ``columns`` more from the other side, and border rows repeated ``rows`` times.

    Raises:
        ValueError: there are more columns to add than there are.
    """
    if columns > maps.size(-1):
        raise ValueError(f"{columns} columns to add to maps of {maps.size(-1)}")
    if columns:
        maps = torch.cat((maps[..., -columns:], maps, maps[..., :columns]), -1)
    return F.pad(maps, (0, 0, rows, rows), mode="replicate") if rows else maps


class PanoConv2d(nn.Conv2d):
    """A convolution with odd kernels that pads around in width and by repetition in height."""

    def __init__(
        self, inputs: int, outputs: int, size: int | tuple[int, int], *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, size, stride=stride, groups=groups)
        if not all(k % 2 for k in self.kernel_size):
            raise ValueError(f"kernels must be odd, got {self.kernel_size}")

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, outputs, H / stride, W / stride]."""
        rows, columns = (k // 2 for k in self.kernel_size)
        return super().forward(circular_pad(maps, columns, rows))


def zero_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1 x 1 convolution that begins at zero."""
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of maps [B, C, H, W]."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalised maps."""
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


def resize_panorama(maps: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resizing of [B, C, H, W] that goes around in width.

    Raises:
        ValueError: a size is not positive.
    """
    if min(height, width) < 1:
        raise ValueError(f"sizes must be positive, got {height} x {width}")
    if tuple(maps.shape[-2:]) == (height, width):
        return maps
    columns = maps.size(-1)
    # As many columns as become a whole number of new ones.
    pad = columns // math.gcd(columns, width)
    padded = circular_pad(maps, pad, 0)
    more = pad * width // columns
    found = F.interpolate(padded, size=(height, width + 2 * more), mode="bilinear", align_corners=False)
    return found[..., more : more + width]


def blend_seam(maps: Tensor, columns: int = 2, *, normals: bool = False) -> Tensor:
    """Maps [B, C, H, W] whose outer ``columns`` go over linearly from one side of the seam to the other.

    Args:
        maps: Depth or normals.
        columns: On each side.
        normals: Normalise the vectors afterwards.

    Raises:
        ValueError: the seam is wider than half of the maps.
    """
    if columns < 1 or 2 * columns > maps.size(-1) // 2:
        raise ValueError(f"columns must be from 1 to a quarter of the width {maps.size(-1)}, got {columns}")
    rolled = maps.roll(columns, -1)
    left, right = rolled[..., :1], rolled[..., 2 * columns - 1 : 2 * columns]
    share = torch.linspace(0, 1, 2 * columns, dtype=maps.dtype, device=maps.device)
    line = torch.lerp(left, right, share)
    if normals:
        line = F.normalize(line, dim=1)
    return torch.cat((line, rolled[..., 2 * columns :]), -1).roll(-columns, -1)
