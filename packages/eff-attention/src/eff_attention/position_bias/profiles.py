"""Numbers of a rollout: how much the first, the last and the middle positions count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PositionProfile(NamedTuple):
    """Where the influence of a rollout lies.

    Attributes:
        last_row: Share of each position in the last token, [n].
        column_mean: Mean share of each position in the tokens from it on, [n].
        first: Share of the first token in the last one.
        recency: Share of the last tenth.
        middle: Share of the central half.
        u_shape: Mean share of a token in the first and last tenths, minus that of a token in the central half; above 0
            both ends are preferred on average.
    """

    last_row: Tensor
    column_mean: Tensor
    first: float
    recency: float
    middle: float
    u_shape: float


def position_profile(rollout: Tensor) -> PositionProfile:
    """Profile of one rollout [n, n] without padding.

    Raises:
        ValueError: it is not square, or rows do not add up to 1.
    """
    if rollout.ndim != 2 or rollout.size(0) != rollout.size(1):
        raise ValueError(f"a rollout must be [n, n], got {list(rollout.shape)}")
    p = rollout.double()
    if bool(((p.sum(1) - 1).abs() > 1e-3).any()):
        raise ValueError("rows of a rollout must add up to 1; cut the padding off")
    n = len(p)
    last = p[-1]
    tenth, quarter = max(1, n // 10), n // 4
    middle = last[quarter : n - quarter]
    counts = torch.arange(n, 0, -1, dtype=p.dtype)
    ends = (last[:tenth].mean() + last[-tenth:].mean()) / 2
    return PositionProfile(
        last,
        p.tril().sum(0) / counts,
        float(last[0]),
        float(last[-tenth:].sum()),
        float(middle.sum()),
        float(ends - middle.mean()),
    )
