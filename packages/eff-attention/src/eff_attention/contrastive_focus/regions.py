"""From scores to the part of a picture that is worth a second look."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_regions(
    score: Tensor, top_p: float = 0.2, max_regions: int = 3, *, rank: Literal["score", "area"] = "score"
) -> Tensor:
    """The best connected regions of the highest scores, bool [H, W].

    Args:
        score: [H, W].
        top_p: Share of pixels above the threshold; equal scores at the threshold all pass.
        max_regions: Regions to keep; pixels that touch at a corner alone are not connected.
        rank: By the sum of their scores, or by area.

    Raises:
        ValueError: values out of range or not finite.
    """
    if score.ndim != 2 or not bool(score.isfinite().all()):
        raise ValueError(f"score must be finite [H, W], got {list(score.shape)}")
    if not 0 < top_p <= 1 or max_regions < 1 or rank not in ("score", "area"):
        raise ValueError(
            f"wanted 0 < top_p <= 1, max_regions >= 1 and rank 'score' or 'area', got {top_p}, {max_regions}, {rank!r}"
        )
    count = math.ceil(top_p * score.numel())
    mask = score >= score.flatten().topk(count).values[-1]
    labels = connected(mask)
    found = labels[mask].unique()
    sizes = [float((score.double() if rank == "score" else torch.ones_like(score))[labels == i].sum()) for i in found]
    best = sorted(range(len(found)), key=lambda i: -sizes[i])[:max_regions]
    return torch.isin(labels, found[best])


def connected(mask: Tensor) -> Tensor:
    """A number for each 4-connected region of a mask [H, W], int64; -1 outside.

    Every pixel takes the largest number among its neighbours until nothing changes.
    """
    height, width = mask.shape
    labels = torch.arange(height * width, dtype=torch.float64).view(height, width).to(mask.device)
    labels = labels.masked_fill(~mask, -1)
    while True:
        x = labels[None, None]
        spread = torch.maximum(F.max_pool2d(x, (3, 1), 1, (1, 0)), F.max_pool2d(x, (1, 3), 1, (0, 1)))[0, 0]
        spread = spread.masked_fill(~mask, -1)
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def mask_crop_resize(
    picture: Any, mask: Tensor, *, fill: int = 0, pad: int = 0, keep_outside: bool = False, keep_ratio: bool = False
) -> tuple[Any, tuple[int, int, int, int]]:
    """Black out what is not in the mask, crop to the rest and enlarge it to the picture's larger ratio.

    Args:
        picture: A PIL picture.
        mask: bool [H, W] of its size; an empty one keeps the whole picture.
        fill: Value of what is blacked out.
        pad: Pixels of margin around the crop.
        keep_outside: Black nothing out.
        keep_ratio: Grow the crop to the picture's ratio of sides.

    Returns:
        The refined picture, and the crop (left, top, right, bottom), right and bottom exclusive.

    Raises:
        ValueError: the mask has another size than the picture.
    """
    from PIL import Image

    width, height = picture.size
    if mask.shape != (height, width):
        raise ValueError(f"the mask must be [{height}, {width}] as the picture, got {list(mask.shape)}")
    if not bool(mask.any()):
        return picture, (0, 0, width, height)
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    left, right = max(0, int(columns[0]) - pad), min(width, int(columns[-1]) + 1 + pad)
    top, bottom = max(0, int(rows[0]) - pad), min(height, int(rows[-1]) + 1 + pad)
    if keep_ratio:
        share = max((right - left) / width, (bottom - top) / height)
        left, right = _grown(left, right, round(share * width), width)
        top, bottom = _grown(top, bottom, round(share * height), height)
    kept = Image.fromarray((mask.cpu().numpy() * 255).astype("uint8"))
    masked = picture.convert("RGB")
    if not keep_outside:
        masked = Image.composite(masked, Image.new("RGB", picture.size, (fill,) * 3), kept)
    scale = max(width / (right - left), height / (bottom - top))
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    return masked.crop((left, top, right, bottom)).resize(size, Image.Resampling.LANCZOS), (left, top, right, bottom)


def _grown(start: int, stop: int, size: int, limit: int) -> tuple[int, int]:
    """A range of ``size`` around start..stop, inside of 0..limit."""
    begin = min(max(0, (start + stop - size) // 2), limit - size)
    return min(begin, start), max(begin + size, stop)
