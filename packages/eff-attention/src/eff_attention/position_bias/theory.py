"""What is known without a model: how fast influence drains to the first token, and where decay puts its peak."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def convergence_bound(least: float, depth: int) -> float:
    """Most influence that a causal model can leave outside of the first token: ``(1 - least)^depth``.

    Args:
        least: Least weight that any token gives to the first one, in each layer.
        depth: Layers.
    """
    if not 0 <= least <= 1:
        raise ValueError(f"least must be from 0 to 1, got {least}")
    return (1 - least) ** depth


def decay_profile(depth: int, slope: float, distances: int) -> Tensor:
    """Influence at each distance x through layers whose weights fall as ``exp(-m x)``, not normalised, [distances].

    ``binom(depth - 1 + x, x) exp(-m x)``: the number of ways to go x steps back in ``depth`` layers, each paid alike
    (section 4.2).
    """
    if depth < 1 or distances < 1 or not slope >= 0:
        raise ValueError(
            f"wanted depth and distances of 1 or more and a slope of 0 or more, got {depth}, {distances}, {slope}"
        )
    x = torch.arange(distances, dtype=torch.float64)
    ways = torch.lgamma(depth + x) - torch.lgamma(x + 1) - math.lgamma(depth)
    return torch.exp(ways - slope * x)


def peak_distance(depth: int, slope: float) -> int:
    """Distance at which `decay_profile` is largest: one layer prefers the nearest token, many prefer far ones."""
    if depth < 1 or not slope > 0:
        raise ValueError(f"wanted depth of 1 or more and a positive slope, got {depth} and {slope}")
    return max(0, math.ceil((depth - 1) / math.expm1(slope)) - 1)
