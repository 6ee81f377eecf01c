"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mean_interval(values: Sequence[float], *, draws: int = 2000, digits: int = 4) -> list[float]:
    """Mean, and the 2.5 % and 97.5 % quantiles of the means of as many values drawn again, with a fixed seed.

    Args:
        values: One for each thing that could have been another one: a picture, a prompt, a layout.
        draws: Of the bootstrap.
        digits: To round to.

    Raises:
        ValueError: there is no value.
    """
    data = torch.as_tensor(values, dtype=torch.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"values must be a list of one number or more, got shape {tuple(data.shape)}")
    drawn = torch.randint(len(data), (draws, len(data)), generator=torch.Generator().manual_seed(0))
    ends = torch.quantile(data[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(x), digits) for x in (data.mean(), *ends)]
