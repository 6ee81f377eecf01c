"""Sample calls of neighborhood_attention, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str,
    shape: Sequence[int],
    window: Any,
    stride: Any = 1,
    dilation: Any = 1,
    causal: Any = False,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 0,
    d: int = 16,
    dv: int = 0,
    extra: int = -1,
    scale: float | None = None,
    tags: Sequence[str] = (),
) -> Spec:
    groups, dv = groups or heads, dv or d

    def make(draw: Draw) -> tuple[Any, ...]:
        q = draw.normal(batch, *shape, heads, d)
        k, v = draw.normal(batch, *shape, groups, d), draw.normal(batch, *shape, groups, dv)
        more: tuple[Any, Any] = (None, None)
        if extra >= 0:
            more = (draw.normal(batch, extra, groups, d), draw.normal(batch, extra, groups, dv))
        return q, k, v, window, stride, dilation, causal, scale, *more

    return Spec(name, make, tags=frozenset(tags), bytes=_bytes)


def _bytes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return 2 * q.nbytes + k.nbytes + v.nbytes


SPECS = (
    _case(
        "video-everything", (3, 5, 6), (2, 3, 4), (2, 1, 3), (1, 1, 1), (True, False, False), groups=1, dv=8, extra=3
    ),
    _case("line", (37,), 8, batch=2),
    _case("map", (9, 11), (3, 4), (1, 2), (2, 1), scale=0.3),
    _case("causal-dilated", (23,), (4,), (2,), (3,), True, heads=4, groups=2, extra=2),
    _case("one-window", (5, 6), (5, 6), heads=1, d=8),
    _case("long-window", (150,), 140, causal=True, heads=1, d=24),
    _case("odd-features", (7, 8), 3, d=5, dv=19, heads=3, groups=1),
    _case("no-batch", (4, 5), 3, batch=0, tags=["empty"]),
)

BENCH_SPECS = (
    _case("64x64, K=7, 8x32", (64, 64), 7, heads=8, d=32, tags=["bench"]),
    _case("64x64, K=13, 8x32", (64, 64), 13, heads=8, d=32, tags=["bench"]),
    _case("4096, K=64, 8x32", (4096,), 64, heads=8, d=32, tags=["bench"]),
    _case("4096 causal, K=256, 8x32", (4096,), 256, causal=True, heads=8, d=32, tags=["bench"]),
    _case("8x32x32, K=(3,7,7), 4x32", (8, 32, 32), (3, 7, 7), heads=4, d=32, tags=["bench"]),
)
