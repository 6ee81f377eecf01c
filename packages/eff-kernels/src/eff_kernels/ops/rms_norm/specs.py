"""Sample calls of rms_norm and add_rms_norm, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(name: str, *shape: int, weight: Any = None, scale: float = 1.0, **options: Any) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        gain = draw.normal(shape[-1], scale=0.3, dtype=weight) + 1
        return draw.normal(*shape, scale=scale), gain

    tags = frozenset(options.pop("tags", ()))
    return Spec(name, make, kwargs=options, tags=tags, bytes=_bytes)


def _bytes(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> int:
    rows = x.numel() * x.element_size()
    return rows * (2 if residual is None else 4) + weight.numel() * weight.element_size()


def with_residual(spec: Spec) -> Spec:
    """The same call for add_rms_norm: a residual is drawn after the other inputs."""

    def make(draw: Draw) -> tuple[Any, ...]:
        x, weight = spec.make(draw)
        return x, draw.normal(*x.shape), weight

    return Spec(spec.name, make, spec.kwargs, spec.tags, lambda x, residual, weight: _bytes(x, weight, residual))


SPECS = (
    _case("rows", 5, 96),
    _case("smollm2-decode", 1, 576, tags=["bench"]),
    _case("three-dims", 2, 3, 64, eps=1e-5),
    _case("odd-width", 4, 257),
    _case("narrow", 33, 7),
    _case("one-column", 3, 1),
    _case("vector", 129),
    _case("large-eps", 3, 40, eps=0.5),
    _case("tiny-values", 3, 100, scale=1e-3),
    _case("no-rows", 0, 16, tags=["empty"]),
    _case("no-middle", 2, 0, 16, tags=["empty"]),
    _case("no-columns", 3, 0, tags=["empty"]),
)

BENCH_SPECS = (
    _case("1x576", 1, 576, tags=["bench"]),
    _case("16x576", 16, 576, tags=["bench"]),
    _case("512x576", 512, 576, tags=["bench"]),
    _case("1x4096", 1, 4096, tags=["bench"]),
    _case("512x4096", 512, 4096, tags=["bench"]),
)
