"""The state before any token."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_state(score: Tensor, v: Tensor) -> Tensor:
    """The state [B, H, Dv + 2] before any token: mean of the values, sum of the exponentials, highest score."""
    wide = torch.promote_types(v.dtype, torch.float32)
    state = score.new_zeros(score.size(0), score.size(1), v.size(-1) + 2, dtype=wide)
    state[..., -1] = -torch.inf
    return state
