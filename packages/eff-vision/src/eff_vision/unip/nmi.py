"""Numbers that tell local, hybrid and global attention apart. Maps are weights after softmax, [..., heads, N, N]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-8


def patches_only(attention: Tensor, prefix: int) -> Tensor:
    """The map among patches: the first ``prefix`` tokens (class, registers) are left out, and rows add up to 1 again.

    Raises:
        ValueError: the map is not square, or no patch is left.
    """
    n = attention.size(-1)
    if attention.ndim < 2 or attention.size(-2) != n or not 0 <= prefix < n:
        raise ValueError(f"attention must be [..., N, N] with more than {prefix} tokens, got {list(attention.shape)}")
    patches = attention[..., prefix:, prefix:].double() + EPS
    return patches / patches.sum(-1, keepdim=True)


def attention_nmi(attention: Tensor, *, prefix: int = 1) -> Tensor:
    """Normalised mutual information of query and key positions, float64 [..., heads] in [0, 1].

    0 where all queries look at the same places, 1 where each looks at one of its own (Park and others, ICLR 2023).
    Queries count alike; the information is divided by the root of both entropies.
    """
    a = patches_only(attention, prefix)
    n = a.size(-1)
    if n == 1:
        return torch.zeros(a.shape[:-2], dtype=torch.float64)
    keys = a.mean(-2)
    information = (a * (a.log() - keys[..., None, :].log())).sum((-2, -1)) / n
    entropy = -(keys * keys.log()).sum(-1)
    return (information / (math.log(n) * entropy).clamp_min(EPS).sqrt()).clamp(0, 1)


def attention_entropy(attention: Tensor, *, prefix: int = 1) -> Tensor:
    """Mean entropy of a query's distribution over patches in nats, float64 [..., heads]."""
    a = patches_only(attention, prefix)
    return -(a * a.log()).sum(-1).mean(-1)


def attention_distance(attention: Tensor, grid: tuple[int, int], *, prefix: int = 1) -> Tensor:
    """Mean distance between a query's patch and what it looks at, in patches, float64 [..., heads].

    Raises:
        ValueError: the grid does not hold the patches.
    """
    a = patches_only(attention, prefix)
    if grid[0] * grid[1] != a.size(-1):
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not hold {a.size(-1)} patches")
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack((y, x), -1).flatten(0, 1).double()
    return (a * torch.cdist(place, place).to(a.device)).sum(-1).mean(-1)
