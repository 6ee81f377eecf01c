"""Shelves of objects and a simulated searcher: gaze of people is personal data, and none is shipped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shelf(NamedTuple):
    """A scene.

    Attributes:
        features: What the objects look like, [N, D].
        positions: Rows and columns, [N, 2].
        target: Index of the object that is searched for.
    """

    features: Tensor
    positions: Tensor
    target: int


def make_shelves(
    num: int, *, rows: int = 4, columns: int = 6, kinds: int = 10, colours: int = 6, seed: int = 0
) -> list[Shelf]:
    """Full shelves of objects with a kind and a colour, each one-hot; one of the objects is the target."""
    if min(num, rows, columns) < 1 or kinds * colours < rows * columns + 1:
        raise ValueError(f"{kinds} kinds in {colours} colours are too few for shelves of {rows} x {columns}")
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    positions = torch.stack((y, x), -1).flatten(0, 1)
    shelves = []
    for _ in range(num):
        which = torch.randperm(kinds * colours, generator=g)[: rows * columns]
        features = torch.cat(
            (
                torch.nn.functional.one_hot(which // colours, kinds),
                torch.nn.functional.one_hot(which % colours, colours),
            ),
            1,
        ).float()
        shelves.append(Shelf(features, positions, int(torch.randint(len(which), (), generator=g))))
    return shelves


def simulate_searcher(
    shelf: Shelf,
    generator: torch.Generator,
    *,
    likeness: float = 2.0,
    distance: float = 0.5,
    memory: float = 3.0,
    refix: float = 0.1,
    stop: float = 0.95,
    max_len: int = 20,
) -> list[int]:
    """A path from the middle of the shelf to the target.

    The next object is drawn by the softmax of ``likeness`` times the features shared with the target, minus
    ``distance`` times the way, minus ``memory`` for objects already seen; with probability ``refix`` the eye stays,
    and at the target the search ends with probability ``stop``.
    """
    here = shelf.positions.float().mean(0)
    alike = shelf.features @ shelf.features[shelf.target]
    seen = torch.zeros(len(shelf.features))
    path: list[int] = []
    while len(path) < max_len:
        if path and float(torch.rand((), generator=generator)) < refix:
            path.append(path[-1])
        else:
            way = (shelf.positions - here).norm(dim=1)
            scores = likeness * alike - distance * way - memory * seen
            if path:
                scores[path[-1]] = -torch.inf
            path.append(int(torch.multinomial(scores.softmax(0), 1, generator=generator)))
        seen[path[-1]] = 1
        here = shelf.positions[path[-1]].float()
        if path[-1] == shelf.target and float(torch.rand((), generator=generator)) < stop:
            break
    return path
