"""Chance from a seed, the same on every machine and under every version of Python and numpy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Dice:
    """Draws built on ``random.Random.random`` alone, the one stream that Python promises never to change.

    Args:
        seed: Any integer.
        purpose: Draws of one seed for different purposes do not depend on each other.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self.fraction = random.Random(f"{purpose}:{seed}").random

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.fraction() < probability

    def between(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return low + int(self.fraction() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        """A number between ``low`` and ``high``."""
        return low + self.fraction() * (high - low)

    def choice(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[int(self.fraction() * len(values))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """The values in a random order."""
        return [v for _, _, v in sorted((self.fraction(), i, v) for i, v in enumerate(values))]


def seed_of(source: Any) -> int:
    """An integer seed from an integer, or drawn from a generator of numpy, torch or Python.

    Raises:
        TypeError: ``source`` is something else.
    """
    import numpy as np
    import torch

    if isinstance(source, np.random.Generator):
        return int(source.integers(2**62))
    if isinstance(source, torch.Generator):
        return int(torch.randint(2**62, (), generator=source, device=source.device))
    if isinstance(source, random.Random):
        return int(source.random() * 2**53)
    if isinstance(source, int | np.integer) and not isinstance(source, bool):
        return int(source)
    raise TypeError(f"seed is a {type(source).__name__}; pass an integer or a generator of numpy, torch or random")
