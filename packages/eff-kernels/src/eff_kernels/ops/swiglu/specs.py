"""Sample calls of swiglu, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(name: str, *shape: int, scale: float = 2.0, fused: bool = False, **options: Any) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        if fused:  # the halves of one projection's output, as the serving engine passes them
            both = draw.normal(*shape[:-1], 2 * shape[-1], scale=scale)
            return both[..., : shape[-1]], both[..., shape[-1] :]
        return draw.normal(*shape, scale=scale), draw.normal(*shape)

    return Spec(name, make, tags=frozenset(options.pop("tags", ())), bytes=_bytes)


def _bytes(gate: Tensor, up: Tensor) -> int:
    return 3 * gate.numel() * gate.element_size()


SPECS = (
    _case("rows", 5, 96),
    _case("fused", 5, 96, fused=True),
    _case("smollm2-decode", 1, 1536, fused=True),
    _case("three-dims", 2, 3, 65, fused=True),
    _case("odd-width", 4, 257),
    _case("one-column", 70, 1),
    _case("vector", 129),
    _case("large-values", 3, 200, scale=60.0),
    _case("tiny-values", 3, 100, scale=1e-3),
    _case("no-rows", 0, 16, tags=["empty"]),
    _case("no-middle", 2, 0, 16, fused=True, tags=["empty"]),
    _case("no-columns", 3, 0, tags=["empty"]),
)

BENCH_SPECS = (
    _case("1x1536", 1, 1536, fused=True),
    _case("16x1536", 16, 1536, fused=True),
    _case("512x1536", 512, 1536, fused=True),
    _case("1x11008", 1, 11008, fused=True),
    _case("512x11008", 512, 11008, fused=True),
)
