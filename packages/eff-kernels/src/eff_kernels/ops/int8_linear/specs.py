"""Sample calls of int8_linear, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(name: str, m: int, n: int, k: int, *, outliers: int = 0, bias: bool = False, **options: Any) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        x = draw.normal(m, k).clamp(-5, 5)
        if outliers and m:
            columns = draw.integers(outliers, low=0, high=k)
            x[:, columns] = x[:, columns] + 8  # at least 3 in each row, at least 6 in some
        weight = draw.integers(n, k, low=-127, high=128, dtype=torch.int8)
        absmax = draw.uniform(n, low=0.5, high=2.0, dtype=torch.float32)
        return x, weight, absmax, draw.normal(n) if bias else None

    tags = frozenset(options.pop("tags", ()))
    return Spec(name, make, kwargs=options, tags=tags, bytes=_bytes, flops=_flops)


def _bytes(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None = None) -> int:
    m, n = x.size(0), weight.size(0)
    return x.numel() * x.element_size() + weight.numel() + 4 * n + m * n * x.element_size()


def _flops(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None = None) -> int:
    return 2 * x.size(0) * weight.numel()


SPECS = (
    _case("ragged", 5, 7, 83, bias=True),
    _case("one-row", 1, 29, 64),
    _case("two-rows", 2, 24, 2100),
    _case("blocks", 70, 50, 96),
    _case("outliers", 6, 33, 200, outliers=3, threshold=6.0),
    _case("outliers-one-row", 1, 26, 130, outliers=4, threshold=6.0, bias=True),
    _case("outliers-per-token", 4, 25, 100, outliers=3, threshold=6.0, per_token_outliers=True),
    _case("groups", 5, 40, 300, activation_group=64, bias=True),
    _case("groups-one-row", 1, 37, 1300, activation_group=64),
    _case("groups-ragged", 66, 21, 333, activation_group=96),
    _case("groups-long", 3, 18, 700, activation_group=320),
    _case("groups-outliers", 9, 33, 200, outliers=3, threshold=6.0, activation_group=32),
    _case("groups-outliers-one-row", 1, 26, 270, outliers=4, threshold=6.0, activation_group=128, bias=True),
    _case("groups-per-token", 4, 25, 100, outliers=3, threshold=6.0, per_token_outliers=True, activation_group=32),
    _case("weight-only", 3, 10, 70, activation="none", bias=True),
    _case("one-by-one", 1, 1, 1),
    _case("no-rows", 0, 4, 8, tags=["empty"]),
    _case("no-outputs", 3, 0, 8, tags=["empty"]),
)

SHAPES = ((576, 1536), (2048, 2048), (4096, 11008))
"""Weights [N, K] of the benchmark: the MLP of SmolLM2-135M, a square, the MLP of Llama-2-7B."""
