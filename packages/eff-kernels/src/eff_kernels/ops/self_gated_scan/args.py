"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Args(NamedTuple):
    """Of `self_gated_scan`."""

    score: Tensor
    v: Tensor
    state: Tensor | None
    return_state: bool


class BackwardArgs(NamedTuple):
    """Of the backward of `self_gated_scan`."""

    grad: Tensor
    score: Tensor
    v: Tensor
    out: Tensor
    tops: Tensor
    totals: Tensor
    state: Tensor | None


def check(score: Tensor, v: Tensor, state: Tensor | None) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    fits = score.dim() == 3 and v.dim() == 4 and (score.size(0), score.size(2)) == (v.size(0), v.size(2))
    if not fits or v.size(1) == 0 or score.size(1) % v.size(1):
        raise ValueError(
            "score must be [B, H, T] and v [B, Hkv, T, Dv] with H a multiple of Hkv, "
            f"got {list(score.shape)} and {list(v.shape)}"
        )
    if not (score.is_floating_point() and v.is_floating_point()):
        raise TypeError(f"score and v must have float dtypes, got {score.dtype} and {v.dtype}")
    if state is None:
        return
    wanted = [*score.shape[:2], v.size(-1) + 2]
    if list(state.shape) != wanted:
        raise ValueError(f"state must be {wanted} for these scores and values, got {list(state.shape)}")
    if state.requires_grad:
        raise ValueError("state must not require a gradient; detach it")
