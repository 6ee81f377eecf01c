"""Sample calls of int8_quantize_rows and int8_quantize_columns, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from eff_kernels.testing.specs import Draw, Spec


def _case(name: str, rows: int, k: int, *, scale: float = 1.0, **options: Any) -> Spec:
    tags = frozenset(options.pop("tags", ()))

    def make(draw: Draw) -> tuple[Any, ...]:
        return (draw.normal(rows, k, scale=scale),)

    return Spec(name, make, kwargs=options, tags=tags)


SPECS = (
    _case("rows", 5, 100),
    _case("one-row-outliers", 1, 130, scale=3.0, threshold=6.0),
    _case("outliers", 17, 65, scale=2.5, threshold=6.0),
    _case("all-outliers", 3, 9, scale=1.0, threshold=1e-6),
    _case("narrow", 4, 3),
    _case("one", 1, 1),
    _case("no-rows", 0, 8, tags=["empty"]),
    _case("no-columns", 3, 0, tags=["empty"]),
)
