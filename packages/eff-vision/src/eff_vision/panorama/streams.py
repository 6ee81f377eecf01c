"""Two streams from each map of the backbone: one for what stays, one for what turns with the camera (section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_vision.geometry import erp_angles, erp_rays
from eff_vision.panorama.layers import PanoConv2d


class ERPTokenMixer(nn.Module):
    """A 3 x 3 convolution at the equator that becomes a wide depthwise one, 3 x 9, towards the poles."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = PanoConv2d(channels, channels, 3)
        self.wide = PanoConv2d(channels, channels, (3, 9), groups=channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, C, H, 2H]."""
        _, latitude = erp_angles(*maps.shape[-2:], dtype=torch.float64)
        polar = latitude.sin().abs().to(maps)[:, None]
        return (1 - polar) * self.square(maps) + polar * self.wide(maps)


class InvariantBlock(nn.Module):
    """A residual bottleneck around the mixer; it begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)
        self.mixer = ERPTokenMixer(channels // 4)
        nn.init.zeros_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def change(self, maps: Tensor) -> Tensor:
        """What the block adds."""
        return self.up(F.gelu(self.mixer(F.gelu(self.down(maps)))))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, C, H, 2H]."""
        return maps + self.change(maps)


class GeometryModulatedBlock(InvariantBlock):
    """The same block whose change is scaled and shifted by where a pixel looks: its ray and its angles."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.style = nn.Sequential(nn.Conv2d(5, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, 2 * channels, 1))
        for p in self.style[2].parameters():
            nn.init.zeros_(p)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, C, H, 2H]."""
        gain, shift = self.style(directions(maps)).chunk(2, 1)
        return maps + self.change(maps) * (1 + gain) + shift


def directions(maps: Tensor) -> Tensor:
    """Ray (3), latitude and longitude of each pixel of maps [B, C, H, 2H]: [1, 5, H, 2H]."""
    height, width = maps.shape[-2:]
    longitude, latitude = erp_angles(height, width)
    ray = erp_rays(height, width).movedim(-1, 0)
    angles = (latitude[:, None].expand(height, width), longitude[None].expand(height, width))
    return torch.cat((ray, torch.stack(angles)))[None].to(maps)


class StreamSplit(nn.Module):
    """Maps of the backbone to those of the two streams, block by block with weights of their own.

    Args:
        channels: Of the maps.
        taps: How many maps.
        blocks: Blocks a stream and map.
        streams: 2, or 1 for both.
    """

    def __init__(self, channels: int, taps: int, blocks: int, streams: int) -> None:
        super().__init__()

        def row(kind: type[InvariantBlock]) -> nn.ModuleList:
            return nn.ModuleList(nn.Sequential(*(kind(channels) for _ in range(blocks))) for _ in range(taps))

        self.invariant = row(InvariantBlock)
        self.variant = row(GeometryModulatedBlock) if streams == 2 else None

    def forward(self, maps: list[Tensor]) -> dict[str, list[Tensor]]:
        """Maps of each stream."""
        invariant = [block(m) for block, m in zip(self.invariant, maps, strict=True)]
        if self.variant is None:
            return {"invariant": invariant, "variant": invariant}
        return {"invariant": invariant, "variant": [block(m) for block, m in zip(self.variant, maps, strict=True)]}
