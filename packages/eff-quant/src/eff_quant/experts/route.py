"""Running tokens through the experts that they are sent to, and reading no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[int, Tensor], Tensor]
"""``product(expert, x)``: what an expert makes of the rows x [M, K]."""


class Route(NamedTuple):
    """Which rows go to which expert.

    Attributes:
        order: Places of the flattened choices, sorted by expert, int64 [S]; those without an expert left out.
        runs: Pairs of an expert and how many of the sorted places are its; only experts that are used.
    """

    order: Tensor
    runs: tuple[tuple[int, int], ...]


def route(ids: Tensor, num_experts: int) -> Route:
    """Sort the choices of all tokens by expert.

    Args:
        ids: Experts of each token, integers [T, k]. What is not below ``num_experts`` stands for no expert.
        num_experts: E.
    """
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1)[:num_experts].tolist()
    runs = tuple((expert, count) for expert, count in enumerate(counts) if count)
    return Route(order[: sum(count for _, count in runs)], runs)


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """The expert of each of the sorted rows, int64 [rows]; E for those behind the last expert's."""
    row = torch.arange(rows, device=offsets.device, dtype=torch.int32)
    return torch.searchsorted(offsets[1:], row, right=True)


def grouped(x: Tensor, runs: tuple[tuple[int, int], ...], product: Product) -> Tensor:
    """The products of consecutive runs of rows, each with its expert; there is at least one run."""
    parts = x.split([count for _, count in runs])
    return torch.cat([product(expert, part) for (expert, _), part in zip(runs, parts, strict=True)])


def combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Sum what the experts of each token say.

    Args:
        y: Outputs in sorted order, [S, H].
        order: As in `Route`.
        weights: Of each choice, [T, k].

    Returns:
        [T, H], in the wider dtype of both. Places without an expert add nothing. The sum runs over the places of a
        token in their order, so that it does not depend on the other tokens.
    """
    (tokens, places), flat = weights.shape, weights.reshape(-1)
    weighted = y * flat[order, None]
    spread = weighted.new_zeros(tokens * places, y.shape[1]).index_copy(0, order, weighted)
    return spread.view(tokens, places, y.shape[1]).sum(1)
