"""Drawing tokens from truncated distributions, a whole batch in one pass and without sorting a vocabulary.

Tokens stand in the order of their probabilities, equal ones in that of their numbers, and a token is where a number
from 0 to 1 falls on their sums. Nearly always that is decided among the few hundred largest, which are found in a
twentieth of the time of a sort. Whether they decide it is known for sure; where they do not, everything is sorted. The
token is the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eff_serve.engine.types import Sampling

HEAD = 256
"""Tokens that are looked at first."""


def draw(logits: Tensor, settings: Sequence[Sampling], chances: Sequence[float]) -> list[int]:
    """One token for each row after top-k, min-p and top-p, in this order.

    Args:
        logits: float32 [B, vocab], at least one of each row finite.
        settings: Of each row, with temperatures above zero.
        chances: A number from 0 to 1 for each row, below 1.

    Raises:
        ValueError: a row has a NaN or an infinite logit, or none above minus infinity.
    """
    temperatures = torch.tensor([s.temperature for s in settings], dtype=torch.float32)
    # Below the largest logit all differences are negative: dividing by a tiny temperature gives -inf, never NaN.
    scaled = (logits - logits.amax(1, keepdim=True)) / temperatures[:, None]
    totals = scaled.exp().sum(1, dtype=torch.float64).tolist()
    vocab = logits.size(1)
    head = scaled.topk(min(HEAD, vocab), dim=1)
    values, places = head.values.numpy(), head.indices.numpy()
    tokens = []
    for row, (s, total, chance) in enumerate(zip(settings, totals, chances, strict=True)):
        if not total >= 1:  # the largest alone gives 1
            raise ValueError("the model gave logits that are not finite")
        order = np.lexsort((places[row], -values[row]))
        at = _place(values[row][order], s, total, chance, vocab)
        if at is None:
            whole = scaled[row].sort(descending=True, stable=True)
            at = _place(whole.values.numpy(), s, total, chance, vocab)
            assert at is not None
            tokens.append(int(whole.indices[at]))
        else:
            tokens.append(int(places[row][order[at]]))
    return tokens


def kept(values: Any, s: Sampling, total: float, vocab: int) -> int | None:
    """How many tokens stay, the most likely always among them; None where the largest alone do not tell.

    Args:
        values: The largest of a row's scaled logits, or all of them, in descending order; the first is 0.
        s: Top-k, min-p and top-p.
        total: Sum of the exponentials of the whole row.
        vocab: Length of the row.
    """
    whole = len(values) == vocab
    count: int | None = vocab
    weights = np.exp(values.astype(np.float64))
    if 0 < s.top_k < vocab:
        if s.top_k > len(values):
            return None
        least = values[s.top_k - 1]  # all that equal the k-th stay
        count = _sure(int(np.count_nonzero(values >= least)), whole, len(values))
    if count is not None and s.min_p > 0:
        above = int(np.count_nonzero(weights >= s.min_p))
        count = min(count, above) if count < vocab else _sure(above, whole, len(values))
    if count is None or s.top_p >= 1:
        return count
    if count < vocab:
        total = float(weights[:count].sum())
    sums = np.cumsum(weights[:count])
    last = int(np.searchsorted(sums, s.top_p * total))  # tokens until their sum reaches top_p, that one included
    if last < len(sums):
        return last + 1 if whole or values[last] > values[-1] or count < vocab else None
    return count if count < vocab or whole else None


def _sure(count: int, whole: bool, seen: int) -> int | None:
    """The count, unless it takes in everything that is seen and what is not seen may belong to it."""
    return count if whole or count < seen else None


def _place(values: Any, s: Sampling, total: float, chance: float, vocab: int) -> int | None:
    """Where in the order the chance falls, or None where that is beyond ``values`` or among equals of their last."""
    count = kept(values, s, total, vocab)
    if count is None:
        return None
    sums = np.cumsum(np.exp(values[:count].astype(np.float64)))
    if count < vocab:
        total = float(sums[-1])
    at = int(np.searchsorted(sums, chance * total, side="right"))
    if count < vocab or len(values) == vocab:
        return min(at, count - 1)
    return at if at < len(sums) and values[at] > values[-1] else None
