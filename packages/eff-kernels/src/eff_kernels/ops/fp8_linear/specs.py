"""Sample calls of fp8_linear, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str, m: int, n: int, k: int, *, bias: bool = False, dtype: torch.dtype = torch.float8_e4m3fn, **options: Any
) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        weight = draw.normal(n, k, scale=60.0, dtype=torch.float32).clamp(-448, 448).to(dtype)
        scale = draw.uniform(n, low=0.5, high=2.0, dtype=torch.float32) / 60
        return draw.normal(m, k), weight, scale, draw.normal(n) if bias else None

    tags = frozenset(options.pop("tags", ()))
    return Spec(name, make, kwargs=options, tags=tags)


SPECS = (
    _case("ragged", 5, 7, 83, bias=True),
    _case("one-row", 1, 29, 64),
    _case("e5m2", 2, 10, 1100, dtype=torch.float8_e5m2),
    _case("dynamic", 3, 33, 200, activations="dynamic", bias=True),
    _case("dynamic-one-row", 1, 26, 130, activations="dynamic", dtype=torch.float8_e5m2),
    _case("blocks", 70, 50, 96),
    _case("short", 4, 9, 3),
    _case("one-by-one", 1, 1, 1, activations="dynamic"),
    _case("no-rows", 0, 4, 8, tags=["empty"]),
    _case("no-outputs", 3, 0, 8, tags=["empty"]),
    _case("no-inputs", 3, 4, 0, bias=True, activations="dynamic", tags=["empty"]),
)

SHAPES = ((576, 1536), (2048, 2048), (4096, 11008))
"""Weights [N, K] of the benchmark, as those of int8_linear."""
