"""Scanpaths: paths of object indices, and paths of points on a picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Path = Sequence[int]


class BehaviorStats(NamedTuple):
    """What a path of objects is made of; the last three add up to 1.

    Attributes:
        found: 1 if the last fixation is on the target, else 0.
        length: Number of fixations.
        search: Share of fixations that begin a run on an object not seen before.
        refix: Share that stay where the eye is.
        revisit: Share that begin a run on an object seen before.
    """

    found: float
    length: float
    search: float
    refix: float
    revisit: float


def behavior_stats(path: Path, target: int) -> BehaviorStats:
    """Take a path apart into runs of equal neighbours.

    Raises:
        ValueError: the path is empty.
    """
    if not path:
        raise ValueError("a path needs at least one fixation")
    runs = [(obj, len(list(group))) for obj, group in itertools.groupby(path)]
    seen: set[int] = set()
    search = revisit = 0
    for obj, _ in runs:
        search, revisit = (search, revisit + 1) if obj in seen else (search + 1, revisit)
        seen.add(obj)
    n = len(path)
    return BehaviorStats(float(path[-1] == target), float(n), search / n, (n - len(runs)) / n, revisit / n)


def mean_stats(stats: Sequence[BehaviorStats]) -> BehaviorStats:
    """Means over paths."""
    if not stats:
        raise ValueError("no paths to average")
    return BehaviorStats(*(sum(column) / len(stats) for column in zip(*stats, strict=True)))


def behavioral_delta(prediction: BehaviorStats, human: BehaviorStats) -> tuple[float, tuple[str, ...]]:
    """Mean relative distance of the five means from those of people, and the terms left out because theirs are zero."""
    kept = [(p, h) for p, h in zip(prediction, human, strict=True) if h]
    skipped = tuple(n for n, h in zip(BehaviorStats._fields, human, strict=True) if not h)
    if not kept:
        raise ValueError("all means of the human paths are zero")
    return sum(abs(p - h) / h for p, h in kept) / len(kept), skipped


def sequence_score(a: Path, b: Path) -> float:
    """Needleman-Wunsch alignment with 1 for a match and 0 for gap and mismatch, over the longer length: in [0, 1]."""
    if not a or not b:
        raise ValueError("a path needs at least one fixation")
    row = [0] * (len(b) + 1)
    for x in a:
        before, row = row, [0]
        for j, y in enumerate(b):
            row.append(max(before[j] + (x == y), before[j + 1], row[j]))
    return row[-1] / max(len(a), len(b))


def scanpath_edit_distance(a: Path, b: Path) -> int:
    """Levenshtein distance of two paths."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(before[j] + (x != y), before[j + 1] + 1, row[j] + 1))
    return row[-1]


class MultiMatchScores(NamedTuple):
    """Similarities of two paths of points, each from 0 to 1 (Jarodzka and others, 2010)."""

    shape: float
    direction: float
    length: float
    position: float


def multimatch(a: Tensor, b: Tensor, size: tuple[float, float]) -> MultiMatchScores:
    """Compare paths of points [N >= 2, 2] (x, y) on a picture of ``size`` (width, height), without simplification.

    Saccades are aligned by the cheapest way through the matrix of the lengths of their differences (steps right, down
    and diagonal); the scores are medians over the aligned pairs, divided by their largest possible value.

    Raises:
        ValueError: a path has fewer than two points, or the size is not positive.
    """
    for path in (a, b):
        if path.ndim != 2 or path.size(1) != 2 or path.size(0) < 2:
            raise ValueError(f"paths must be [N >= 2, 2], got {list(path.shape)}")
    if not min(size) > 0:
        raise ValueError(f"size must be positive, got {size}")
    a, b = a.double(), b.double()
    u, v = a.diff(dim=0), b.diff(dim=0)
    pairs = _align(torch.cdist(u, v))
    i, j = (torch.tensor(x) for x in zip(*pairs, strict=True))
    diagonal = float(torch.tensor(size, dtype=torch.float64).norm())
    shape = (u[i] - v[j]).norm(dim=1) / (2 * diagonal)
    turn = (torch.atan2(u[i, 1], u[i, 0]) - torch.atan2(v[j, 1], v[j, 0])).abs()
    turn = torch.minimum(turn, 2 * torch.pi - turn) / torch.pi
    length = (u[i].norm(dim=1) - v[j].norm(dim=1)).abs() / diagonal
    position = (a[i] - b[j]).norm(dim=1) / diagonal
    return MultiMatchScores(*(1 - float(x.quantile(0.5)) for x in (shape, turn, length, position)))


def _align(cost: Tensor) -> list[tuple[int, int]]:
    """Cheapest path from the first to the last cell, every cell on it paid for once but the first."""
    n, m = cost.shape
    costs = cost.tolist()
    best: dict[tuple[int, int], tuple[float, tuple[int, int] | None]] = {(0, 0): (0.0, None)}
    for i in range(n):
        for j in range(m):
            if (i, j) == (0, 0):
                continue
            sources = [p for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p in best]
            source = min(sources, key=lambda p: best[p][0])
            best[i, j] = (best[source][0] + costs[i][j], source)
    path = [(n - 1, m - 1)]
    while (before := best[path[-1]][1]) is not None:
        path.append(before)
    return path[::-1]


def scanmatch(a: Path, b: Path, similarity: Tensor, *, gap: float = 0.0) -> float:
    """ScanMatch (Cristino and others, 2010): alignment with a similarity for each pair of objects, in [0, 1] for gap 0.

    Args:
        a: A path.
        b: Another.
        similarity: [N, N], how alike two objects (or places) are.
        gap: Added for each gap, at most 0.
    """
    if not a or not b:
        raise ValueError("a path needs at least one fixation")
    table = similarity.tolist()
    row = [gap * j for j in range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        before, row = row, [gap * i]
        for j, y in enumerate(b):
            row.append(max(before[j] + table[x][y], before[j + 1] + gap, row[j] + gap))
    return row[-1] / (float(similarity.max()) * max(len(a), len(b)))


def fixations_to_objects(points: Tensor, boxes: Tensor) -> Tensor:
    """Object of each point: the box that holds it, of several the one with the nearest centre, else the nearest centre.

    Args:
        points: [T, 2] (x, y).
        boxes: [N, 4] (x0, y0, x1, y1).

    Returns:
        int64 [T].
    """
    if boxes.ndim != 2 or boxes.size(1) != 4 or not len(boxes) or bool((boxes[:, 2:] <= boxes[:, :2]).any()):
        raise ValueError(f"boxes must be [N >= 1, 4] with x0 < x1 and y0 < y1, got {list(boxes.shape)}")
    distance = torch.cdist(points.double(), (boxes[:, :2] + boxes[:, 2:]).double() / 2)
    inside = ((points[:, None] >= boxes[None, :, :2]) & (points[:, None] < boxes[None, :, 2:])).all(-1)
    held = distance.masked_fill(~inside, torch.inf)
    return torch.where(inside.any(1), held.argmin(1), distance.argmin(1))
