"""Encoders: a small convolutional one, and a pyramid over any network that gives maps at strides 8, 16 and 32."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def convolution(inputs: int, outputs: int, size: int, *, stride: int = 1) -> nn.Sequential:
    """Convolution, normalisation over groups (batches hold a clip or two), leaky rectifier."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.GroupNorm(math.gcd(16, outputs), outputs),
        nn.LeakyReLU(0.1),
    )


class ConvEncoder(nn.Module):
    """A plain encoder: [N, 3, H, W] to [N, channels, H / 8, W / 8]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter, half = max(8, channels // 4), max(8, channels // 2)
        self.layers = nn.Sequential(
            convolution(3, quarter, 3, stride=2),
            convolution(quarter, half, 3, stride=2),
            convolution(half, channels, 3, stride=2),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Map at stride 8."""
        return self.layers(pictures)


class FeaturePyramid(nn.Module):
    """The map at stride 8 of a feature pyramid (Lin and others, 2017) over a network with maps at strides 8, 16, 32.

    Args:
        backbone: Gives a sequence of three maps, finest first, such as timm's ``create_model(name, features_only=True,
            out_indices=(2, 3, 4))``.
        widths: Their channels, such as timm's ``backbone.feature_info.channels()``.
        channels: Of the result.
    """

    def __init__(self, backbone: nn.Module, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        if len(widths) != 3:
            raise ValueError(f"widths must be those of three maps, got {list(widths)}")
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map at stride 8.

        Raises:
            ValueError: the network gives another number of maps, or the finest is not at stride 8.
        """
        maps = list(self.backbone(pictures))
        if len(maps) != 3:
            raise ValueError(f"the backbone gave {len(maps)} maps; wanted those at strides 8, 16 and 32")
        if maps[0].shape[-2] * 8 != pictures.shape[-2]:
            raise ValueError(f"the finest map has {maps[0].shape[-2]} rows of {pictures.shape[-2]}; wanted stride 8")
        fine, middle, coarse = (lateral(m) for lateral, m in zip(self.lateral, maps, strict=True))
        middle = middle + F.interpolate(coarse, size=middle.shape[-2:], mode="bilinear", align_corners=False)
        return self.smooth(fine + F.interpolate(middle, size=fine.shape[-2:], mode="bilinear", align_corners=False))
