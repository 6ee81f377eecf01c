"""The contrast of two maps, and the score of each pixel (section 4)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast_attention(task: Tensor, general: Tensor, lam: float = 1e-8) -> Tensor:
    """``task / (general + lam)`` in float32 (eq. 4.6), of maps [T, L, N] cut to the shorter T.

    Places that neither map looks at are 0.

    Raises:
        ValueError: layers or places differ, or ``lam`` is negative.
    """
    if not lam >= 0:
        raise ValueError(f"lam must not be negative, got {lam}")
    if task.shape[1:] != general.shape[1:]:
        raise ValueError(
            f"maps must be [T, L, N] of the same layers and places, got {list(task.shape)}, {list(general.shape)}"
        )
    steps = min(len(task), len(general))
    above, below = task[:steps].float(), general[:steps].float() + lam
    return torch.where(above > 0, above / below.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def fuse_attention(
    maps: Tensor, grid: tuple[int, int], size: tuple[int, int], *, time: Literal["all", "first", "last"] = "all"
) -> Tensor:
    """One score for each pixel [H, W]: the maps [T, L, N] summed over layers and tokens, then enlarged.

    Token t counts t times with "all": later tokens know more of the answer.

    Raises:
        ValueError: the grid does not hold N places, or there are no maps.
    """
    if maps.ndim != 3 or grid[0] * grid[1] != maps.size(-1) or not maps.size(0):
        raise ValueError(f"wanted maps [T >= 1, L, {grid[0] * grid[1]}] for a grid of {grid}, got {list(maps.shape)}")
    layers = maps.float().sum(1)
    if time == "all":
        weights = torch.arange(1, len(layers) + 1, device=maps.device, dtype=torch.float32)
        score = (layers * weights[:, None]).sum(0)
    elif time in ("first", "last"):
        score = layers[0 if time == "first" else -1]
    else:
        raise ValueError(f"time={time!r}; use 'all', 'first' or 'last'")
    return F.interpolate(score.view(1, 1, *grid), size=size, mode="bilinear", align_corners=False)[0, 0]
