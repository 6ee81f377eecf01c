"""Intervals over pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Interval(NamedTuple):
    """A value with the percentile interval of its bootstrap."""

    value: float
    low: float
    high: float


def bootstrap(
    items: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The statistic of all items, and its interval when items are drawn with replacement.

    Raises:
        ValueError: there are no items, or the level is not between 0 and 1.
    """
    if not items or not 0 < level < 1 or draws < 1:
        raise ValueError(f"wanted items, draws of 1 or more and a level in (0, 1), got {len(items)}, {draws}, {level}")
    rng = np.random.default_rng(seed)
    values = [statistic([items[i] for i in rng.integers(0, len(items), len(items))]) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(statistic(items), float(low), float(high))
