"""Sample calls of sparse_linear_attention, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eff_kernels.ops.sparse_linear_attention.blocks import BlockMap, num_blocks
from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str,
    length: int,
    keys: int,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 0,
    d: int = 16,
    dv: int = 0,
    blocks: tuple[int, int] = (16, 16),
    holes: bool = False,
    tags: Sequence[str] = (),
    **kwargs: Any,
) -> Spec:
    groups, dv = groups or heads, dv or d

    def make(draw: Draw) -> tuple[Any, ...]:
        q, k, v = (
            draw.normal(batch, h, n, c) for h, n, c in ((heads, length, d), (groups, keys, d), (groups, keys, dv))
        )
        shape = (batch, heads, num_blocks(length, blocks[0]), num_blocks(keys, blocks[1]))
        mask = draw.integers(*shape, low=-1, high=2, dtype=torch.int8)
        if not holes:  # a query block without a critical key has an infinite lse
            mask[..., :1] = 1
        return q, k, v, BlockMap(mask, *blocks)

    return Spec(name, make, kwargs=kwargs, tags=frozenset(tags))


SPECS = (
    _case("odd", 37, 29, batch=2, heads=4, groups=2, d=8, dv=11, blocks=(8, 6), scale=0.4),
    _case("square", 64, 64, holes=True),
    _case("elu-noncritical", 70, 50, feature_map="elu", linear_scope="noncritical", blocks=(32, 16)),
    _case("relu-all", 40, 33, feature_map="relu", linear_scope="all", blocks=(8, 4), d=20),
    _case("one-block", 12, 40, blocks=(64, 64), heads=1, groups=1, d=64),
    _case("no-queries", 0, 20, tags=["empty"]),
    _case("no-keys", 20, 0, tags=["empty"]),
    _case("no-batch", 20, 20, batch=0, tags=["empty"]),
)
