"""Linear layers of the decoder: float weights, and several layers that cannot be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from eff_kernels import linear
from torch import Tensor


class Linear(Protocol):
    """Maps [T, K] to [T, N], each row by itself: an answer must not depend on its neighbours in the batch."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the layer reads to do so."""
        ...


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """y = x W^T + b, summed in float32 from weights in the dtype of the checkpoint."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes

    @staticmethod
    def stack(layers: Sequence[FloatLinear]) -> FloatLinear:
        """One layer with the outputs of all."""
        bias = stack_biases([layer.bias for layer in layers], [layer.weight.size(0) for layer in layers])
        return FloatLinear(torch.cat([layer.weight for layer in layers]), bias)


@dataclass(frozen=True, slots=True)
class Separate:
    """Layers with the same input that cannot be stacked, such as those of two formats; their outputs side by side."""

    layers: tuple[Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        return torch.cat([layer(x) for layer in self.layers], -1)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)


def stack_biases(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Biases of layers one after the other, zeros where a layer has none; None if none has one."""
    if all(b is None for b in biases):
        return None
    return torch.cat([torch.zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)])
