"""Which tokens a layer's region holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_guidance.layerbind.layout import Box, Layer, Layout


class Grid(NamedTuple):
    """Lines and columns of picture tokens, counted line by line."""

    high: int
    wide: int


@dataclass(frozen=True)
class Region:
    """The tokens of one layer.

    Attributes:
        idx: Tokens in the region, int64 [n], ascending.
        outside: All others, int64.
        top, left, high, wide: The smallest rectangle of tokens around the region.
        inside: Which tokens of that rectangle belong to it, bool [high, wide].
        is_box: Whether it came from a box.
        alpha: Given alpha of its tokens, float32 [n], or None.
    """

    idx: Tensor
    outside: Tensor
    top: int
    left: int
    high: int
    wide: int
    inside: Tensor
    is_box: bool
    alpha: Tensor | None = None

    def to_map(self, values: Tensor) -> Tensor:
        """Values of the tokens [B, n] on the rectangle [B, high, wide], zeros beside the region."""
        made = values.new_zeros(len(values), self.high, self.wide)
        made[:, self.inside] = values
        return made

    def from_map(self, values: Tensor) -> Tensor:
        """Values on the rectangle [B, high, wide] of the tokens alone, [B, n]."""
        return values[:, self.inside]


def boxes_to_token_indices(boxes: Sequence[Box], height: int, width: int, patch_px: int) -> list[Tensor]:
    """Tokens that boxes touch: the upper left corner rounded down, the lower right one up, cut at the border.

    Args:
        boxes: Left, top, right, bottom in points; corners may be swapped.
        height: Of the picture in points, a multiple of ``patch_px``.
        width: Likewise.
        patch_px: Points a side of a token.

    Returns:
        For each box its tokens, int64 [n], ascending; tokens are counted line by line.

    Raises:
        ValueError: a box lies outside of the picture or has no area, or the sides are no multiples.
    """
    if height % patch_px or width % patch_px:
        raise ValueError(f"a picture of {width} x {height} points is not a multiple of patch_px={patch_px}")
    high, wide = height // patch_px, width // patch_px
    found = []
    for box in boxes:
        (left, right), (top, bottom) = (sorted(v / patch_px for v in side) for side in (box[::2], box[1::2]))
        if left == right or top == bottom or right <= 0 or bottom <= 0 or left >= wide or top >= high:
            raise ValueError(f"box={tuple(box)} holds nothing of a picture of {width} x {height} points")
        x1, y1 = (max(math.floor(round(v, 6)), 0) for v in (left, top))
        x2, y2 = min(math.ceil(round(right, 6)), wide), min(math.ceil(round(bottom, 6)), high)
        lines, columns = torch.arange(y1, max(y2, y1 + 1)), torch.arange(x1, max(x2, x1 + 1))
        found.append((lines[:, None] * wide + columns).flatten())
    return found


def mask_to_token_indices(mask: Tensor, grid: Grid) -> Tensor:
    """Tokens of which a mask [h, w] covers at least half, int64 [n]."""
    return (stretch(mask, grid) >= 0.5).flatten().nonzero()[:, 0]


def stretch(values: Tensor, grid: Grid) -> Tensor:
    """Means of [h, w] over the tokens, float32 [high, wide]."""
    return F.adaptive_avg_pool2d(values.float()[None, None], (grid.high, grid.wide))[0, 0]


def region_of(layer: Layer, size: tuple[float, float], grid: Grid, device: torch.device | str = "cpu") -> Region:
    """The tokens of a layer on a grid.

    Raises:
        ValueError: the region holds no token.
    """
    if layer.box is not None:
        x, y = grid.wide / size[0], grid.high / size[1]
        x1, y1, x2, y2 = layer.box
        (idx,) = boxes_to_token_indices([(x1 * x, y1 * y, x2 * x, y2 * y)], grid.high, grid.wide, 1)
    else:
        assert layer.mask is not None
        idx = mask_to_token_indices(layer.mask.cpu(), grid)
        if not len(idx):
            raise ValueError(f"the mask of the layer {layer.prompt!r} covers no token of {grid.wide} x {grid.high}")
    held = torch.zeros(grid.high * grid.wide, dtype=torch.bool)
    held[idx] = True
    lines, columns = idx // grid.wide, idx % grid.wide
    top, left = int(lines.min()), int(columns.min())
    high, wide = int(lines.max()) + 1 - top, int(columns.max()) + 1 - left
    inside = held.view(grid)[top : top + high, left : left + wide].clone()
    alpha = None if layer.alpha is None else stretch(layer.alpha.cpu(), grid).flatten()[idx].to(device)
    return Region(
        idx.to(device), (~held).nonzero()[:, 0].to(device), top, left, high, wide, inside.to(device),
        layer.box is not None, alpha,
    )  # fmt: skip


def regions_of(layout: Layout, grid: Grid, device: torch.device | str = "cpu") -> list[Region]:
    """The regions of a layout in the order of painting: the furthest first."""
    return [region_of(layer, layout.size, grid, device) for layer in reversed(layout.layers)]


def overlaps_earlier(regions: Sequence[Region]) -> list[bool]:
    """For each region whether it shares tokens with one before it."""
    seen: set[int] = set()
    found = []
    for region in regions:
        own = set(region.idx.tolist())
        found.append(bool(own & seen))
        seen |= own
    return found


def groups_by_neighbours(regions: Sequence[Region], count: int) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Picture tokens by the regions that do *not* hold them: (tokens, those regions)."""
    device = regions[0].idx.device if regions else torch.device("cpu")
    code = torch.zeros(count, dtype=torch.long, device=device)
    for i, region in enumerate(regions):
        code[region.outside] += 2**i
    kinds = code.unique().tolist()
    return [((code == kind).nonzero()[:, 0], tuple(i for i in range(len(regions)) if kind >> i & 1)) for kind in kinds]
