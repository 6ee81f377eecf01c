"""Sample calls of taylor_linear_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str,
    t: int,
    d: int,
    e: int = 0,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 0,
    mask: bool = False,
    tags: Sequence[str] = (),
    **options: Any,
) -> Spec:
    groups, e = groups or heads, e or d

    def make(draw: Draw) -> tuple[Any, ...]:
        q, k, v = (draw.normal(batch, h, t, n) for h, n in ((heads, d), (groups, d), (groups, e)))
        return q, k, v, draw.integers(batch, t, low=0, high=3).bool() if mask else None

    return Spec(name, make, options, frozenset(tags))


SPECS = (
    _case("chunks", 37, 8, chunk_size=16),
    _case("grouped-masked", 50, 5, 7, batch=2, heads=4, groups=2, mask=True, chunk_size=20),
    _case("whole", 150, 16, heads=1),
    _case("state-out", 20, 4, heads=2, groups=1, mask=True, chunk_size=8, return_state=True),
    _case("two-tokens", 2, 16, return_state=True),
    _case("scale", 33, 24, 3, scale=0.7, chunk_size=32),
    _case("no-token", 0, 8, return_state=True, tags=["empty"]),
    _case("no-batch", 4, 8, batch=0, tags=["empty"]),
)

BENCH_SPECS = tuple(
    _case(f"8 heads of {d}, {t} tokens", t, d, heads=8, tags=["bench"]) for d in (16, 64) for t in (512, 2048, 8192)
)
