"""Sample inputs: one list of named shapes per op, which its tests and its benchmark both walk through."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """Draws inputs from one seeded generator, with the same values on each device."""

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of standard deviation ``scale``, in the spec's dtype unless said otherwise."""
        x = torch.randn(*shape, generator=self.generator) * scale
        return x.to(device=self.device, dtype=dtype or self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform numbers in [low, high)."""
        x = torch.rand(*shape, generator=self.generator) * (high - low) + low
        return x.to(device=self.device, dtype=dtype or self.dtype)

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers in [low, high)."""
        x = torch.randint(low, high, shape, generator=self.generator)
        return x.to(device=self.device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Spec:
    """One call of an op's public function.

    Attributes:
        name: Short and unique in the op's list; with the seed it fixes the values.
        make: Gives the positional arguments from a `Draw`.
        kwargs: Keyword arguments, without the backend.
        tags: For choosing, such as "bench", "empty" or "slow".
        bytes: For benchmarks: least memory traffic in bytes, from the positional arguments.
        flops: For benchmarks: number of arithmetic operations, from the positional arguments.
    """

    name: str
    make: Callable[[Draw], tuple[Any, ...]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    bytes: Callable[..., int] | None = None
    flops: Callable[..., int] | None = None

    def args(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """The positional arguments: the same values on every call with the same dtype and seed."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + seed)
        return self.make(Draw(generator, dtype, torch.device(device)))


def padded_rows(x: Tensor, margin: int = 3) -> Tensor:
    """The same values as a view whose rows lie apart: unit stride in the last dimension, NaN before, between and after.

    A kernel that reads over the end of a row, or takes the row length for the row stride, then gives NaN. Integers get
    their largest value instead.
    """
    if x.dim() == 0:
        return x
    wide = _filled(x, (*x.shape[:-1], x.shape[-1] + 2 * margin))
    view = wide[..., margin : margin + x.shape[-1]]
    return view.copy_(x)


def strided_columns(x: Tensor, step: int = 2) -> Tensor:
    """The same values as a view with stride ``step`` in the last dimension and NaN between them."""
    if x.dim() == 0:
        return x
    view = _filled(x, (*x.shape[:-1], x.shape[-1] * step))[..., ::step]
    return view.copy_(x)


def swapped_dims(x: Tensor) -> Tensor:
    """The same values with the memory order of the first and the last dimension exchanged."""
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else strided_columns(x)


NON_CONTIGUOUS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "padded_rows": padded_rows,
    "strided_columns": strided_columns,
    "swapped_dims": swapped_dims,
}
"""Ways to lay out the same values; each maps a tensor to an equal one."""


def _filled(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.is_floating_point():
        return torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    value = True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    return torch.full(shape, value, dtype=x.dtype, device=x.device)
