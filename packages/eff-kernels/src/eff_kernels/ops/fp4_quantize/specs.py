"""Sample calls of fp4_quantize, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(name: str, rows: int, k: int, format: str, *, scale: float = 1.0, **options: Any) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        s_g = draw.uniform(1, low=0.001, high=0.01, dtype=torch.float32)[0] if format == "nvfp4" else None
        return draw.normal(rows, k, scale=scale), s_g

    tags = frozenset(options.pop("tags", ()))
    return Spec(name, make, kwargs={"format": format, **options}, tags=tags, bytes=_bytes)


def _bytes(x: Tensor, *_: Any) -> int:
    return x.numel() * x.element_size() + x.numel() // 2 + x.numel() // 16


SPECS = (
    _case("nvfp4", 5, 112, "nvfp4"),
    _case("mxfp4-floor", 7, 96, "mxfp4"),
    _case("mxfp4-even", 3, 1056, "mxfp4", scale_rounding="even"),
    _case("mxfp4-ceil", 4, 64, "mxfp4", scale_rounding="ceil", scale=1e-3),
    _case("mxfp4-rceil", 4, 160, "mxfp4", scale_rounding="rceil", scale=1e3),
    _case("nvfp4-one-block", 1, 16, "nvfp4"),
    _case("no-rows", 0, 32, "mxfp4", tags=["empty"]),
    _case("no-columns", 3, 0, "nvfp4", tags=["empty"]),
)
