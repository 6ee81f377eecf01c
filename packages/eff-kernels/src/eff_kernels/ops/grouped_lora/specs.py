"""Sample calls of grouped_lora, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str,
    t: int,
    k: int,
    n: int,
    r: int,
    experts: int,
    places: int,
    *,
    weights: bool = True,
    scale: bool = True,
    y: bool = True,
    none: bool = False,
    ids_dtype: torch.dtype = torch.int64,
    tags: Iterable[str] = (),
) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        x, a = draw.normal(t, k), draw.normal(experts, r, k, scale=max(k, 1) ** -0.5)
        b = draw.normal(experts, n, r)
        ids = draw.integers(t, places, low=-1 if none else 0, high=experts, dtype=ids_dtype)
        return (
            x, a, b, ids, draw.uniform(t, places) if weights else None,
            draw.uniform(experts, low=0.5, high=2.0, dtype=torch.float32) if scale else None,
            draw.normal(t, n) if y else None,
        )  # fmt: skip

    return Spec(name, make, bytes=_bytes, flops=_flops, tags=frozenset(tags))


def _bytes(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, *_: Any) -> int:
    used = int(ids.unique().numel()) if ids.numel() else 0
    return (
        x.numel() * x.element_size()
        + used * (a[0].numel() + b[0].numel()) * a.element_size()
        + 2 * x.shape[0] * b.shape[1] * x.element_size()
    )


def _flops(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, *_: Any) -> int:
    return 2 * ids.numel() * a.shape[1] * (a.shape[2] + b.shape[1])


SPECS = (
    _case("ragged", 9, 37, 29, 5, 4, 3, none=True),
    _case("one-row", 1, 64, 48, 16, 6, 3),
    _case("long-row-no-y", 3, 1100, 13, 4, 3, 2, y=False),
    _case("rows", 40, 40, 70, 8, 5, 2, none=True, ids_dtype=torch.int32),
    _case("one-adapter-a-row", 18, 24, 18, 8, 5, 1, weights=False, none=True),
    _case("plain", 6, 20, 9, 3, 2, 2, weights=False, scale=False),
    _case("rank-one", 5, 12, 10, 1, 3, 2),
    _case("smallest", 1, 1, 1, 1, 1, 1),
    _case("no-rows", 0, 8, 6, 4, 3, 2, tags=["empty"]),
    _case("no-places", 3, 8, 6, 4, 3, 0, tags=["empty"]),
    _case("no-outputs", 3, 8, 0, 4, 3, 2, tags=["empty"]),
)
