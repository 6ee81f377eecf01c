"""Sample calls of fp4_linear, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.ops.fp4_quantize.common import BLOCKS
from eff_kernels.testing.specs import Draw, Spec


def _case(name: str, m: int, n: int, k: int, format: str, *, bias: bool = False, **options: Any) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        packed = draw.integers(n, k // 2, low=0, high=256, dtype=torch.uint8)
        blocks = (n, k // BLOCKS[format])
        x, b = draw.normal(m, k), draw.normal(n) if bias else None
        if format == "mxfp4":
            return x, packed, draw.integers(*blocks, low=120, high=128, dtype=torch.uint8), None, b
        scale = draw.uniform(*blocks, low=0.01, high=448.0, dtype=torch.float32).to(torch.float8_e4m3fn)
        return x, packed, scale, draw.uniform(1, low=0.001, high=0.01, dtype=torch.float32)[0], b

    tags = frozenset(options.pop("tags", ()))
    return Spec(name, make, kwargs={"format": format, **options}, tags=tags, bytes=_bytes, flops=_flops)


def _bytes(x: Tensor, packed: Tensor, scale: Tensor, *_: Any) -> int:
    return (x.numel() + x.size(0) * packed.size(0)) * x.element_size() + packed.numel() + scale.numel()


def _flops(x: Tensor, packed: Tensor, *_: Any) -> int:
    return 4 * x.size(0) * packed.numel()


SPECS = (
    _case("nvfp4-ragged", 5, 7, 80, "nvfp4", bias=True),
    _case("mxfp4-ragged", 6, 13, 96, "mxfp4", bias=True),
    _case("nvfp4-one-row", 1, 29, 272, "nvfp4"),
    _case("mxfp4-one-row", 1, 26, 416, "mxfp4", bias=True),
    _case("nvfp4-blocks", 70, 50, 80, "nvfp4"),
    _case("mxfp4-blocks", 67, 33, 160, "mxfp4"),
    _case("nvfp4-long", 9, 5, 1136, "nvfp4"),
    _case("nvfp4-activations", 4, 10, 48, "nvfp4", activations="dynamic"),
    _case("mxfp4-activations", 3, 9, 64, "mxfp4", activations="dynamic", scale_rounding="even", bias=True),
    _case("one-block", 1, 1, 16, "nvfp4"),
    _case("no-rows", 0, 4, 32, "mxfp4", tags=["empty"]),
    _case("no-outputs", 3, 0, 32, "nvfp4", tags=["empty"]),
    _case("no-inputs", 3, 4, 0, "nvfp4", bias=True, tags=["empty"]),
)

SHAPES = ((576, 1536), (2048, 2048), (4096, 11008))
"""Weights [N, K] of the benchmark: the MLP of SmolLM2-135M, a square, the MLP of Llama-2-7B."""
