"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean_interval(values: Sequence[float], *, draws: int = 2000, digits: int = 4) -> list[float]:
    """Mean, and the 2.5 % and 97.5 % quantiles of the means of as many values drawn again, with a fixed seed.

    Args:
        values: One for each thing that could have been another one: a picture, a prompt, a layout.
        draws: Of the bootstrap.
        digits: To round to.

    Raises:
        ValueError: there is no value.
    """
    data = np.asarray(values, float)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"values must be a list of one number or more, got shape {data.shape}")
    means = data[np.random.default_rng(0).integers(len(data), size=(draws, len(data)))].mean(1)
    return [round(float(x), digits) for x in (data.mean(), *np.quantile(means, (0.025, 0.975)))]
