"""Sample calls of fp8_quantize, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from eff_kernels.testing.specs import Draw, Spec


def _case(name: str, rows: int, k: int, *, scale: float = 1.0, **options: Any) -> Spec:
    tags = frozenset(options.pop("tags", ()))

    def make(draw: Draw) -> tuple[Any, ...]:
        return (draw.normal(rows, k, scale=scale),)

    return Spec(name, make, kwargs=options, tags=tags)


SPECS = (
    _case("rows", 5, 100),
    _case("e5m2", 4, 37, dtype=torch.float8_e5m2),
    _case("power-of-two", 17, 65, power_of_two=True),
    _case("small", 3, 33, scale=1e-6),
    _case("narrow", 4, 3),
    _case("one", 1, 1),
    _case("no-rows", 0, 8, tags=["empty"]),
    _case("no-columns", 3, 0, tags=["empty"]),
)
