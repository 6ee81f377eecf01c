"""From maps of words over patches to a heat map, a point and a mask on the picture."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_guidance.refam.words import directions

_SIGMA = 0.25  # of "middle", as a share of the side
_LEAST = 0.5  # weight at the far end of a direction


def grounding_heatmap(
    maps: Tensor, keep: Tensor, grid: tuple[int, int], size: tuple[int, int], *, rescale: bool = False
) -> Tensor:
    """Sum of the kept tokens' maps, averaged over blocks, at the size of the picture.

    Args:
        maps: [L, N, T], or [N, T] for maps that are averaged already.
        keep: Which tokens to add, bool [T].
        grid: Rows and columns of patches, N = rows * columns.
        size: Height and width of the picture in points.
        rescale: Whether each token's map is brought to 0..1 first.

    Returns:
        float32 [H, W].

    Raises:
        ValueError: nothing is kept, or shapes do not fit.
    """
    mean = maps.float().mean(0) if maps.dim() == 3 else maps.float()
    if mean.dim() != 2 or mean.shape[0] != grid[0] * grid[1] or keep.shape != mean.shape[1:]:
        raise ValueError(f"maps {list(maps.shape)} and keep {list(keep.shape)} do not fit a grid of {grid}")
    if not bool(keep.any()):
        raise ValueError("keep has no token")
    kept = mean[:, keep.to(mean.device)]
    if rescale:
        low, high = kept.amin(0), kept.amax(0)
        kept = (kept - low) / (high - low).clamp(min=1e-12)
    flat = kept.sum(1).reshape(1, 1, *grid)
    return F.interpolate(flat, size, mode="bilinear", align_corners=False)[0, 0]


def spatial_bias(expression: str, size: tuple[int, int]) -> Tensor:
    """Weights of the places of a picture for the directions that an expression names, float32 [H, W].

    A linear ramp from 0.5 to 1 towards "left", "right", "top", "bottom", a Gaussian for "middle"; several multiply. All
    ones if none is named. The form is a choice of this package.
    """
    height, width = size
    down, across = ((torch.arange(n) + 0.5) / n for n in (height, width))
    weight = torch.ones(height, width)
    for direction in directions(expression):
        if direction == "middle":
            away = (down[:, None] - 0.5) ** 2 + (across[None, :] - 0.5) ** 2
            weight = weight * torch.exp(-away / (2 * _SIGMA**2))
            continue
        line = down[:, None] if direction in ("top", "bottom") else across[None, :]
        near = line if direction in ("bottom", "right") else 1 - line
        weight = weight * (_LEAST + (1 - _LEAST) * near)
    return weight


def peaks(heatmap: Tensor, count: int = 1, *, apart: int = 16) -> list[tuple[int, int]]:
    """The highest places (x, y) of a heat map [H, W] after a 3 x 3 mean, highest first.

    Each further one is more than ``apart`` points away from the earlier ones, in rows or columns; where there is no
    room for ``count``, there are fewer. Of equal places the first in reading order is taken.
    """
    padded = F.pad(heatmap.float()[None, None], (1, 1, 1, 1), mode="replicate")
    smooth = F.avg_pool2d(padded, 3, stride=1)[0, 0].clone()
    found: list[tuple[int, int]] = []
    while len(found) < count and bool((smooth > -torch.inf).any()):
        y, x = divmod(int(smooth.argmax()), smooth.shape[1])
        found.append((x, y))
        smooth[max(0, y - apart) : y + apart + 1, max(0, x - apart) : x + apart + 1] = -torch.inf
    return found


def region_at(heatmap: Tensor, point: tuple[int, int]) -> Tensor:
    """Where a heat map [H, W] is above mean + 1 deviation, the part that is connected with a point; bool [H, W].

    The place of the point itself always belongs to it. Neighbours across corners count as connected.
    """
    high = heatmap > heatmap.mean() + heatmap.std(correction=0)
    x, y = point
    region = torch.zeros_like(high)
    region[y, x] = high[y, x] = True
    while True:
        grown = F.max_pool2d(region[None, None].float(), 3, stride=1, padding=1)[0, 0].bool() & high
        if torch.equal(grown, region):
            return region
        region = grown


def box_of(mask: Tensor) -> tuple[int, int, int, int] | None:
    """x0, y0, x1, y1 of a mask [H, W] in points, x1 and y1 outside of it; None for an empty one."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def overlay(picture: Tensor, heatmap: Tensor, *, strength: float = 0.6) -> Any:
    """A heat map over a picture, to look at.

    Args:
        picture: float [3, H, W] from 0 to 1.
        heatmap: [H, W]; its own range is what is shown.
        strength: Share of the heat map where it is highest.

    Returns:
        uint8 NumPy array [H, W, 3]; hot places are red and yellow, the picture is grey below.
    """
    low, high = heatmap.amin(), heatmap.amax()
    heat = ((heatmap - low) / (high - low).clamp(min=1e-12)).float().cpu()
    grey = picture.float().cpu().mean(0, keepdim=True).expand(3, -1, -1) * 0.8 + 0.1
    colour = torch.stack([(heat * 1.5).clamp(max=1), (heat * 2 - 0.8).clamp(0, 1), 0.25 * (1 - heat)])
    share = strength * heat.sqrt()
    return ((grey * (1 - share) + colour * share).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
