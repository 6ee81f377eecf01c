"""Sample calls of self_gated_scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str,
    t: int,
    e: int,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 0,
    scale: float = 1.0,
    mask: bool = False,
    tags: Sequence[str] = (),
    **options: Any,
) -> Spec:
    groups = groups or heads

    def make(draw: Draw) -> tuple[Any, ...]:
        score, v = draw.normal(batch, heads, t, scale=scale), draw.normal(batch, groups, t, e)
        if mask:
            score = score.masked_fill(draw.integers(batch, 1, t, low=0, high=3) == 0, float("-inf"))
        return score, v

    return Spec(name, make, options, frozenset(tags), bytes=_bytes)


def _bytes(score: Tensor, v: Tensor, *_: Any) -> int:
    return score.nbytes + v.nbytes * (1 + score.size(1) // v.size(1))


SPECS = (
    _case("plain", 37, 16),
    _case("grouped-masked", 70, 5, batch=2, heads=4, groups=2, mask=True, return_state=True),
    _case("steep", 100, 24, scale=30.0),
    _case("wide", 19, 300, heads=1),
    _case("one-token", 1, 8, return_state=True),
    _case("long", 300, 8, heads=1, mask=True),
    _case("no-token", 0, 8, return_state=True, tags=["empty"]),
    _case("no-batch", 4, 8, batch=0, tags=["empty"]),
)

BENCH_SPECS = tuple(_case(f"8 heads of 64, {t} tokens", t, 64, heads=8, tags=["bench"]) for t in (512, 2048, 8192))
