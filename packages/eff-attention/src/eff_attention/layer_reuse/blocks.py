"""Attention mass of blocks of keys: what a profile is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_mass(weights: Tensor, block_size: int) -> Tensor:
    """Sum of attention weights over blocks of keys: [..., S] to [..., ceil(S / block_size)]."""
    return F.pad(weights, (0, -weights.size(-1) % block_size)).unflatten(-1, (-1, block_size)).sum(-1)


def heaviest(mass: Tensor, count: int, ends: Tensor, must: tuple[int, ...]) -> Tensor:
    """Which blocks have the most mass, bool like ``mass``.

    Args:
        mass: [T, G, N], of each block for each step and head.
        count: How many to choose; all of them where a step has no more.
        ends: int64 [T], blocks that exist at each step.
        must: Blocks that are always chosen: 0, 1, ... from the first, -1, -2, ... from the last.
    """
    place = torch.arange(mass.size(-1), device=mass.device)
    inside = (place < ends[:, None])[:, None]
    score = mass.float()
    for m in must:
        forced = place == (m if m >= 0 else ends[:, None] + m)
        score = score.masked_fill(forced.expand(len(ends), -1)[:, None], torch.inf)
    score = score.masked_fill(~inside, -1.0)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, largest(score, count), True) & inside


def largest(score: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest entries of each row, all where there are no more: [..., N] to [..., count].

    The earlier of equal ones, whatever else is in the batch and however many entries follow (``topk`` does not say).
    """
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def ratio90(mass: Tensor, share: float = 0.9) -> Tensor:
    """Share of the blocks whose largest ones hold no more than ``share`` of the mass: [..., N] to [...].

    0 where one block holds more than that; near ``share`` where attention is uniform.
    """
    ordered = mass.double().sort(-1, descending=True).values
    total = (ordered / ordered.sum(-1, keepdim=True)).cumsum(-1)
    return (total <= share + 1e-12).sum(-1).double() / mass.size(-1)
