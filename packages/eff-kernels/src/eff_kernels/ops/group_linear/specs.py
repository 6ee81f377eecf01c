"""Sample calls of group_linear, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from eff_kernels.ops.group_linear.pack import GROUP, GroupWeight
from eff_kernels.testing.specs import Draw, Spec


def weight_of(n: int, k: int, *, bits: int, minima: bool, wide: bool, seed: int = 0) -> GroupWeight:
    """A random weight."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)
    scale = torch.rand(n, k // GROUP, generator=generator) * 0.1
    minimum = torch.randn(n, k // GROUP, generator=generator) if minima else None
    if not wide:
        scale, minimum = scale.half(), None if minimum is None else minimum.half()
    return GroupWeight.pack(codes, scale, minimum, bits=bits, offset=0 if minima else 2 ** (bits - 1))


def _case(
    name: str, m: int, n: int, k: int, *, bits: int = 4, bias: bool = False, tags: Any = (), **layout: Any
) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        weight = weight_of(n, k, bits=bits, minima=layout.get("minima", False), wide=layout.get("wide", False))
        options = (weight.n, weight.bits, weight.offset, weight.minima, weight.wide)
        x = draw.normal(m, k)
        return x, weight.packed.to(x.device), draw.normal(n) if bias else None, *options

    return Spec(name, make, tags=frozenset(tags))


SPECS = (
    _case("q4_1", 5, 48, 96, minima=True),
    _case("q4_0-one-row", 1, 64, 64),
    _case("q8_0", 13, 33, 64, bits=8, bias=True),
    _case("wide-minima", 9, 20, 128, minima=True, wide=True),
    _case("wide-8-bit", 3, 17, 32, bits=8, wide=True),
    _case("many-rows", 71, 80, 64, minima=True, bias=True),
    _case("no-rows", 0, 16, 32, tags=["empty"]),
)
