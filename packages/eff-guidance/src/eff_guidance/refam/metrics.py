"""Measures of referral segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _pairs(masks: Sequence[Tensor], truth: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if not len(masks) or len(masks) != len(truth):
        raise ValueError(f"{len(masks)} masks and {len(truth)} true ones; wanted equal numbers, at least one")
    both = [(torch.as_tensor(a).bool(), torch.as_tensor(b).bool()) for a, b in zip(masks, truth, strict=True)]
    for a, b in both:
        if a.shape != b.shape:
            raise ValueError(f"a mask of {list(a.shape)} cannot be compared with a true one of {list(b.shape)}")
    return both


def overall_iou(masks: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Sum of all intersections over the sum of all unions (oIoU): large objects count more.

    Raises:
        ValueError: not as many masks as true ones, none at all, or shapes that differ.
    """
    both = _pairs(masks, truth)
    union = sum(int((a | b).sum()) for a, b in both)
    return sum(int((a & b).sum()) for a, b in both) / max(1, union)


def mean_iou(masks: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Mean over samples of intersection over union (mIoU); two empty masks count as 1.

    Raises:
        ValueError: as `overall_iou`.
    """
    each = [(int((a & b).sum()), int((a | b).sum())) for a, b in _pairs(masks, truth)]
    return sum(i / u if u else 1.0 for i, u in each) / len(each)


def point_accuracy(points: Sequence[tuple[float, float]], truth: Sequence[Tensor]) -> float:
    """Share of points (x, y), in points of the picture, that lie in their true mask [H, W].

    Raises:
        ValueError: not as many points as masks, none at all, or a point outside of its picture.
    """
    if not len(points) or len(points) != len(truth):
        raise ValueError(f"{len(points)} points and {len(truth)} masks; wanted equal numbers, at least one")
    hits = 0
    for (x, y), mask in zip(points, truth, strict=True):
        height, width = mask.shape
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"the point ({x}, {y}) lies outside of a picture of {width} x {height}")
        hits += bool(torch.as_tensor(mask)[int(y), int(x)])
    return hits / len(points)
