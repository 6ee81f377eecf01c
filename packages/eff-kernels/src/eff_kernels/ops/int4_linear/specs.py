"""Sample calls of int4_linear and int8_static_linear, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str, m: int, n: int, k: int, *, bits: int, static: bool = False, bias: bool = False, tags: Iterable[str] = ()
) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        x = draw.normal(m, k)
        if bits == 4:
            weight = draw.integers(n, k // 2, low=0, high=256, dtype=torch.uint8)
        else:
            weight = draw.integers(n, k, low=-128, high=128, dtype=torch.int8)
        scale = draw.uniform(n, low=0.01, high=0.1, dtype=torch.float32)
        # Some entries of x are beyond 127 steps.
        input_scale = draw.uniform(k, low=0.015, high=0.05, dtype=torch.float32) if static else None
        b = draw.normal(n) if bias else None
        return (x, weight, scale, b, input_scale) if bits == 4 else (x, weight, scale, input_scale, b)

    return Spec(name, make, bytes=_bytes, flops=_flops, tags=frozenset(tags))


def _bytes(x: Tensor, weight: Tensor, scale: Tensor, *_: Any) -> int:
    m, n = x.size(0), weight.size(0)
    return x.numel() * x.element_size() + weight.numel() + 4 * n + m * n * x.element_size()


def _flops(x: Tensor, weight: Tensor, scale: Tensor, *_: Any) -> int:
    return 2 * x.numel() * weight.size(0)


INT4_SPECS = (
    _case("ragged", 5, 7, 82, bits=4, bias=True),
    _case("one-row", 1, 29, 64, bits=4, bias=True),
    _case("one-long-row", 1, 5, 4102, bits=4),
    _case("three-rows", 3, 24, 2102, bits=4),
    _case("blocks", 70, 50, 96, bits=4),
    _case("static", 6, 33, 202, bits=4, static=True, bias=True),
    _case("static-one-row", 1, 26, 130, bits=4, static=True),
    _case("smallest", 1, 1, 2, bits=4),
    _case("no-rows", 0, 4, 8, bits=4, tags=["empty"]),
    _case("no-columns", 3, 4, 0, bits=4, bias=True),
    _case("no-outputs", 3, 0, 8, bits=4, tags=["empty"]),
)

INT8_SPECS = (
    _case("int8-ragged", 5, 7, 83, bits=8, static=True, bias=True),
    _case("int8-one-row", 1, 29, 131, bits=8, static=True),
    _case("int8-blocks", 70, 50, 96, bits=8, static=True),
    _case("int8-no-rows", 0, 4, 8, bits=8, static=True, tags=["empty"]),
)

SHAPES = ((576, 1536), (2048, 2048), (4096, 11008))
"""Weights [N, K] of the benchmark: the MLP of SmolLM2-135M, a square, the MLP of Llama-2-7B."""
