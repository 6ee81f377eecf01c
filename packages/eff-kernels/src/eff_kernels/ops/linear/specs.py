"""Sample calls of linear, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str, m: int, n: int, k: int, *, bias: bool = False, weight: torch.dtype | None = None, **tags: Any
) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(m, k), draw.normal(n, k, dtype=weight), draw.normal(n) if bias else None

    return Spec(name, make, tags=frozenset(tags.get("tags", ())), bytes=_bytes, flops=_flops)


def _bytes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return (
        x.numel() * x.element_size()
        + weight.numel() * weight.element_size()
        + x.size(0) * weight.size(0) * x.element_size()
    )


def _flops(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return 2 * x.size(0) * weight.numel()


SPECS = (
    _case("ragged", 5, 7, 83, bias=True),
    _case("one-row", 1, 29, 64),
    _case("one-row-bf16-weight", 1, 27, 1100, weight=torch.bfloat16),
    _case("rows-bf16-weight", 70, 26, 1030, weight=torch.bfloat16, bias=True),
    _case("rows-f16-weight", 3, 26, 40, weight=torch.float16),
    _case("short", 4, 9, 3),
    _case("one-by-one", 1, 1, 1),
    _case("no-rows", 0, 4, 8, tags=["empty"]),
    _case("no-outputs", 3, 0, 8, tags=["empty"]),
    _case("no-inputs", 3, 4, 0, bias=True, tags=["empty"]),
)
