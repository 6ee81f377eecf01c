"""Scanpaths: paths of object indices, and paths of points on a picture."""

from __future__ import annotations

import heapq
import itertools
import math
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
    """Similarities of two paths of points, each from 0 to 1 (Jarodzka and others, 2010).

    The last one, of the durations of fixations, is None where they were not given.
    """

    shape: float
    direction: float
    length: float
    position: float
    duration: float | None = None


def multimatch(
    a: Tensor, b: Tensor, size: tuple[float, float], *, durations: tuple[Tensor, Tensor] | None = None
) -> MultiMatchScores:
    """Compare paths of points [N >= 2, 2] (x, y) on a picture of ``size`` (width, height), without simplification.

    Saccades are aligned by the cheapest way through the matrix of the lengths of their differences (steps right, down
    and diagonal); the scores are medians over the aligned pairs, divided by their largest possible value. ``durations``
    are those of the fixations, [N] of each path, above 0; the difference of a pair is divided by its longer one.

    Raises:
        ValueError: a path has fewer than two points, the size is not positive, or durations do not fit.
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
    differences = [shape, turn, length, position]
    if durations is not None:
        for path, given in zip((a, b), durations, strict=True):
            if given.shape != path.shape[:1] or not bool((given > 0).all()):
                raise ValueError(f"durations must be [{path.size(0)}] and above 0, got {given.tolist()}")
        first, second = durations[0].double()[i], durations[1].double()[j]
        differences.append((first - second).abs() / torch.maximum(first, second))
    return MultiMatchScores(*(1 - float(x.quantile(0.5)) for x in differences))


def _align(cost: Tensor) -> list[tuple[int, int]]:
    """Cheapest path from the first to the last cell, every cell on it paid for once but the first.

    Of several cheapest paths, which are common where points lie on a grid, this is the one of the reference program
    (multimatch-gaze): Dijkstra's, which among places equally far goes on from the one that comes last.
    """
    n, m = cost.shape
    costs = cost.tolist()
    far = {(0, 0): 0.0}
    before: dict[tuple[int, int], tuple[int, int]] = {}
    heap, done = [(0.0, 0, 0)], set[tuple[int, int]]()
    while heap:
        so_far, i, j = heapq.heappop(heap)
        here = (-i, -j)
        if here in done:
            continue
        done.add(here)
        for there in ((1 - i, 1 - j), (1 - i, -j), (-i, 1 - j)):
            if there[0] < n and there[1] < m and (new := so_far + costs[there[0]][there[1]]) < far.get(there, math.inf):
                far[there], before[there] = new, here
                heapq.heappush(heap, (new, -there[0], -there[1]))
    path = [(n - 1, m - 1)]
    while path[-1] in before:
        path.append(before[path[-1]])
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
