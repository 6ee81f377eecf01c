"""Two augmented crops of a picture, with their edges in it. On tensors [C, H, W] in [0, 1]; no other library."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_GREY = (0.299, 0.587, 0.114)


class TwoViews(NamedTuple):
    """Two views of one picture: pictures [C, S, S] and crops [4]; see `eff_vision.pixpro.cells`."""

    view_a: Tensor
    view_b: Tensor
    crop_a: Tensor
    crop_b: Tensor


def random_resized_crop(
    picture: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Tensor, Tensor]:
    """A crop of random area and shape, resized to [C, size, size], and its edges (x0, y0, x1, y1) in the picture.

    Ten tries for one that fits, then the largest centred one of an allowed ratio.
    """
    if picture.ndim != 3:
        raise ValueError(f"a picture must be [C, H, W], got {list(picture.shape)}")
    height, width = picture.shape[1:]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for _ in range(10):
        area = height * width * uniform(*scale)
        aspect = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x = int(torch.randint(width - w + 1, (), generator=generator))
            y = int(torch.randint(height - h + 1, (), generator=generator))
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        x, y = (width - w) // 2, (height - h) // 2
    part = picture[None, :, y : y + h, x : x + w]
    resized = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False, antialias=True)[0]
    edges = torch.tensor([x / width, y / height, (x + w) / width, (y + h) / height], dtype=torch.float64)
    return resized.clamp(0, 1), edges


def random_flip(picture: Tensor, crop: Tensor, generator: torch.Generator, p: float = 0.5) -> tuple[Tensor, Tensor]:
    """Mirror left and right with probability ``p``; the crop's x edges change places."""
    if float(torch.rand((), generator=generator)) >= p:
        return picture, crop
    return picture.flip(-1), crop[[2, 1, 0, 3]]


class ByolAugment:
    """Colours, grey, blur and solarisation of one view (Grill and others, 2020, appendix B).

    Args:
        blur: Probability of the blur: 1 for the first view, 0.1 for the second.
        solarize: Probability of solarisation: 0 for the first view, 0.2 for the second.
        strength: Factor of the colour changes.
    """

    def __init__(self, *, blur: float = 1.0, solarize: float = 0.0, strength: float = 1.0) -> None:
        for name, value in (("blur", blur), ("solarize", solarize)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability, got {value}")
        self.blur, self.solarize, self.strength = blur, solarize, strength

    def __call__(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a picture [3, H, W] in [0, 1]."""
        rand = torch.rand(9, generator=generator).tolist()
        grey = torch.tensor(_GREY)[:, None, None]
        if rand[0] < 0.8:
            s = self.strength
            picture = picture * (1 + 0.4 * s * (2 * rand[1] - 1))
            mean = (picture * grey).sum(0).mean()
            picture = mean + (picture - mean) * (1 + 0.4 * s * (2 * rand[2] - 1))
            level = (picture * grey).sum(0, keepdim=True)
            picture = level + (picture - level) * (1 + 0.2 * s * (2 * rand[3] - 1))
            picture = _turn_hue(picture, 0.1 * s * (2 * rand[4] - 1)).clamp(0, 1)
        if rand[5] < 0.2:
            picture = (picture * grey).sum(0, keepdim=True).expand(3, -1, -1)
        if rand[6] < self.blur:
            picture = _blur(picture, 0.1 + 1.9 * rand[7])
        if rand[8] < self.solarize:
            picture = torch.where(picture >= 0.5, 1 - picture, picture)
        return picture


def _turn_hue(picture: Tensor, turns: float) -> Tensor:
    """Turn colours about the grey axis, in YIQ: a good match of a turn in HSV for small angles, and differentiable."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    c, s = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    turn = torch.tensor([[1.0, 0, 0], [0, c, -s], [0, s, c]])
    return torch.einsum("ij,jhw->ihw", torch.linalg.inv(to_yiq) @ turn @ to_yiq, picture)


def _blur(picture: Tensor, sigma: float) -> Tensor:
    radius = max(1, math.ceil(3 * sigma))
    radius = min(radius, min(picture.shape[1:]) - 1)
    x = torch.arange(-radius, radius + 1, dtype=picture.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(picture.size(0), 1, 1, -1)
    padded = F.pad(picture[None], (radius, radius, radius, radius), mode="reflect")
    across = F.conv2d(padded, kernel, groups=picture.size(0))
    return F.conv2d(across, kernel.mT, groups=picture.size(0))[0]
