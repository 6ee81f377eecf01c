"""Attention as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eff_train.drawing import over, sheet, to_image

PLACES = ((2, 2), (2, 5), (5, 2), (5, 5))
CROSSES = [f"from {y + 1}, {x + 1}" for y, x in PLACES]


def from_patches(picture: Tensor, weights: Tensor) -> list[Image.Image]:
    """Attention [65, 65] from four patches over a picture, the patch that looks framed."""
    shown = []
    for y, x in PLACES:
        view = over(F.interpolate(picture[None], scale_factor=2.0)[0], weights[1 + 8 * y + x, 1:].view(8, 8))
        top, left, side = 16 * y, 16 * x, 16
        mark = torch.tensor([0.2, 1.0, 1.0])[:, None, None]
        view[:, top : top + side, [left, left + side - 1]] = mark
        view[:, [top, top + side - 1], left : left + side] = mark
        shown.append(to_image(view))
    return shown


def atlas_of(picture: Tensor, maps: Sequence[Tensor], titles: Sequence[str]) -> Image.Image:
    """Layers in two columns, each with its title: where it looks from four patches; maps [65, 65]."""
    rows = [from_patches(picture, m) for m in maps]
    half = (len(rows) + 1) // 2
    return sheet([[sheet(rows[i : i + half], titles[i : i + half], CROSSES) for i in (0, half)]])
