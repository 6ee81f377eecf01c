"""How like the searcher's the model's paths are, and simple rules to compare with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from eff_vision.metrics import (
    behavior_stats,
    behavioral_delta,
    mean_stats,
    multimatch,
    scanmatch,
    scanpath_edit_distance,
    sequence_score,
)
from eff_vision.scanpath import Shelf

Paths = list[list[int]]


class Searches(NamedTuple):
    """Shelves and the paths of searchers on each."""

    shelves: list[Shelf]
    paths: list[Paths]


def alike(known: Searches, drawn: list[Paths]) -> dict[str, float]:
    """Alignment with the searcher's paths on the same shelf, and the distance of the five means of behaviour."""
    pairs = [
        sequence_score(a, b) for ours, theirs in zip(drawn, known.paths, strict=True) for a in ours for b in theirs
    ]
    mine, other = (
        mean_stats([behavior_stats(p, s.target) for s, paths in zip(known.shelves, of, strict=True) for p in paths])
        for of in (drawn, known.paths)
    )
    return {
        "sequence": float(np.mean(pairs)), "delta": behavioral_delta(mine, other)[0], "found": mine.found,
        "length": mine.length, "search": mine.search, "refix": mine.refix, "revisit": mine.revisit,
    }  # fmt: skip


def scores(known: Searches, drawn: list[Paths]) -> dict[str, float]:
    """`alike`, and further distances of paths: the first drawn one with the first of the searcher, and so on."""
    sums: dict[str, list[float]] = {n: [] for n in ("edit", "scanmatch", "shape", "direction", "position")}
    for shelf, paths, found in zip(known.shelves, known.paths, drawn, strict=True):
        way = torch.cdist(shelf.positions.float(), shelf.positions.float())
        near = torch.exp(-(way**2) / 2)
        points = shelf.positions.flip(-1).float() + 0.5
        size = (float(points[:, 0].max() + 0.5), float(points[:, 1].max() + 0.5))
        for a, b in zip(found, paths, strict=True):
            sums["edit"].append(scanpath_edit_distance(a, b))
            sums["scanmatch"].append(scanmatch(a, b, near))
            if len(a) > 1 and len(b) > 1:
                matched = multimatch(points[a], points[b], size)
                sums["shape"].append(matched.shape)
                sums["direction"].append(matched.direction)
                sums["position"].append(matched.position)
    means = {name: float(np.mean(values)) for name, values in sums.items() if values}
    return alike(known, drawn) | means


def random_walk(objects: int, length: int, chance: np.random.Generator) -> list[int]:
    """Objects at random."""
    return chance.integers(0, objects, length).tolist()


def nearest_walk(shelf: Shelf, length: int) -> list[int]:
    """The nearest object not yet seen, from the middle on."""
    here, path = shelf.positions.float().mean(0), list[int]()
    for _ in range(min(length, len(shelf.positions))):
        way = (shelf.positions - here).norm(dim=1)
        way[path] = torch.inf
        path.append(int(way.argmin()))
        here = shelf.positions[path[-1]].float()
    return path
