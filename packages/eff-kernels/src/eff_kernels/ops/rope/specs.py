"""Sample calls of rope, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(
    name: str, b: int, h: int, t: int, d: int, *, rotated: int | None = None, tables: int = 1, **options: Any
) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        angle = draw.uniform(tables, t, (d if rotated is None else rotated) // 2, high=100.0, dtype=torch.float32)
        return draw.normal(b, h, t, d), angle.cos(), angle.sin()

    tags = frozenset(options.pop("tags", ()))
    return Spec(name, make, kwargs=options, tags=tags, bytes=_bytes)


def _bytes(x: Tensor, cos: Tensor, sin: Tensor) -> int:
    return 2 * x.numel() * x.element_size() + 8 * cos.numel()


SPECS = (
    _case("two-sequences", 2, 3, 5, 16, tables=2),
    _case("smollm2-decode", 1, 12, 1, 64),
    _case("interleaved", 2, 3, 5, 16, tables=2, interleaved=True),
    _case("shared-angles", 3, 2, 4, 8),
    _case("part-of-the-features", 2, 2, 3, 20, rotated=12),
    _case("part-interleaved", 2, 2, 3, 20, rotated=12, interleaved=True),
    _case("odd-width", 1, 2, 3, 13, rotated=10),
    _case("odd-pairs", 1, 3, 2, 14),
    _case("odd-pairs-interleaved", 1, 3, 2, 14, interleaved=True),
    _case("wide", 1, 1, 2, 1100, rotated=1062),
    _case("wide-interleaved", 1, 1, 2, 1100, rotated=1062, interleaved=True),
    _case("nothing-rotated", 1, 2, 3, 8, rotated=0),
    _case("no-tokens", 2, 3, 0, 8, tags=["empty"]),
    _case("no-batch", 0, 3, 4, 8, tags=["empty"]),
    _case("no-heads", 2, 0, 4, 8, tags=["empty"]),
    _case("no-features", 2, 3, 4, 0, tags=["empty"]),
)

BENCH_SPECS = (  # queries and keys of SmolLM2-135M (9 + 3 heads) and Llama-3-8B (32 + 8 heads)
    _case("decode 1x12x1x64", 1, 12, 1, 64, tags=["bench"]),
    _case("decode 16x12x1x64", 16, 12, 1, 64, tables=16, tags=["bench"]),
    _case("prefill 1x12x512x64", 1, 12, 512, 64, tags=["bench"]),
    _case("decode 1x40x1x128", 1, 40, 1, 128, tags=["bench"]),
    _case("prefill 1x40x512x128", 1, 40, 512, 128, tags=["bench"]),
)
