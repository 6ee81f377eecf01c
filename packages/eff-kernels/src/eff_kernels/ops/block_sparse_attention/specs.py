"""Sample calls of block_sparse_attention, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str,
    queries: int,
    keys: int,
    block_q: int,
    block_k: int,
    *,
    share: float = 0.3,
    batch: int = 1,
    heads: int = 2,
    groups: int = 0,
    d: int = 16,
    dv: int = 0,
    scale: float | None = None,
    tags: Sequence[str] = (),
) -> Spec:
    groups, dv = groups or heads, dv or d

    def make(draw: Draw) -> tuple[Any, ...]:
        q, k = draw.normal(batch, heads, queries, d), draw.normal(batch, groups, keys, d)
        v = draw.normal(batch, groups, keys, dv)
        rows, columns = -(-queries // block_q), -(-keys // block_k)
        ranks = draw.normal(batch, heads, rows, columns).argsort(-1).argsort(-1)
        block_map = (ranks < max(1, round(share * columns))).to(torch.int8)
        return q, k, v, block_map, block_q, block_k, scale

    return Spec(name, make, tags=frozenset(tags), bytes=_bytes)


def _bytes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return 2 * q.nbytes + k.nbytes + v.nbytes


SPECS = (
    _case("grouped-cross", 40, 50, 16, 16, heads=4, groups=2, d=8, dv=12),
    _case("small-blocks", 20, 33, 8, 5, heads=4, groups=2, d=8, dv=12),
    _case("square", 64, 64, 16, 16, batch=2),
    _case("ragged", 75, 90, 32, 16, d=24, scale=0.3),
    _case("one-block", 33, 40, 64, 64, heads=1),
    _case("blocks-of-tiles", 150, 200, 128, 64, share=0.5, heads=1, d=24),
    _case("everything", 48, 48, 16, 16, share=1.0, d=64),
    _case("odd-features", 50, 70, 16, 32, d=5, dv=19, heads=3, groups=1),
    _case("no-batch", 16, 16, 16, 16, batch=0, tags=["empty"]),
    _case("no-queries", 0, 16, 16, 16, tags=["empty"]),
    _case("no-keys", 16, 0, 16, 16, tags=["empty"]),
)

BENCH_SPECS = tuple(
    _case(f"{n} tokens, {share:.0%}, 8x64", n, n, 64, 64, share=share, heads=8, d=64, tags=["bench"])
    for n, share in ((4096, 0.05), (4096, 0.1), (4096, 0.2), (4096, 0.4), (16384, 0.05))
)
