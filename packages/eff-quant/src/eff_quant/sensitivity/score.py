"""Loss and KL divergence on identical tokens, kept by segments of a text so that an interval can be drawn from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Neighbouring tokens share their context, so the bootstrap draws runs of this many tokens, not single ones.
SEGMENT = 64
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the tokens of each segment, in nats: negative log-likelihood, and KL of the base to this model."""

    nll: tuple[float, ...]
    kl: tuple[float, ...]


def segments(length: int) -> list[tuple[int, int]]:
    """Where the segments of a window begin and end among its ``length - 1`` predicted tokens."""
    return [(a, min(a + SEGMENT, length - 1)) for a in range(0, length - 1, SEGMENT)]


def score(logits: Tensor, base: Tensor, ids: Tensor) -> Score:
    """Score one window.

    Args:
        logits: Of the model that is judged, [T, V].
        base: Of the model that it is compared with, [T, V].
        ids: The tokens [T]; the first is context only.
    """
    nll, kl = [], []
    for a, b in segments(len(ids)):
        found = torch.log_softmax(logits[a:b].float(), -1)
        expected = torch.log_softmax(base[a:b].float(), -1)
        nll.append(-found.gather(1, ids[a + 1 : b + 1, None]).double().sum().item())
        kl.append((expected.exp() * (expected - found)).sum(-1).double().sum().item())
    return Score(tuple(nll), tuple(kl))


def mean(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Mean over all tokens."""
    return math.fsum(sums) / sum(counts)


def interval(sums: Sequence[float], counts: Sequence[int], *, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean over tokens: segments are drawn with replacement, always the same draws.

    The same draws for every pass make differences of two passes paired: give the differences of the sums.
    """
    n = len(sums)
    draws = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    value, count = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    means = value[draws].sum(1) / count[draws].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64)).tolist()
    return low, high
