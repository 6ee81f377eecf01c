"""The two kinds of linear layers of the decoder: float weights, and int8 with activations quantised on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from eff_kernels import int8_linear, int8_quantize_rows, linear
from torch import Tensor

from eff_serve.engine.weights import Checkpoint, CheckpointError


class Linear(Protocol):
    """Maps [T, K] to [T, N]."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the layer reads to do so."""
        ...


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """y = x W^T + b, summed in float32 from weights in the dtype of the checkpoint; a row depends on no other."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """LLM.int8(). Outliers are taken out token by token: an answer must not depend on its neighbours."""

    weight: Tensor
    absmax: Tensor
    bias: Tensor | None
    threshold: float
    group: int | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return int8_linear(
            x, self.weight, self.absmax, self.bias, threshold=self.threshold, per_token_outliers=True,
            activation_group=self.group,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.weight.nbytes + self.absmax.nbytes


def load_linear(
    checkpoint: Checkpoint,
    names: Sequence[str],
    sizes: Sequence[int],
    k: int,
    *,
    quantize: str | None,
    threshold: float,
    group: int | None,
) -> Linear:
    """Read layers that share an input and stack them into one, so that one call does the work of several.

    Int8 folders (``weight`` int8 with ``SCB``, the layout of bitsandbytes) are taken as they are; scales belong to rows
    and stacking changes no number. Float weights are quantised here when ``quantize`` is "int8".

    Raises:
        CheckpointError: a tensor is missing, or layers that share an input are of two kinds.
    """
    weights, scales, floats, biases = [], [], [], []
    for name, n in zip(names, sizes, strict=True):
        weight = checkpoint.get(f"{name}.weight", (n, k))
        if weight.dtype == torch.int8:
            scales.append(checkpoint.floats(f"{name}.SCB", (n,)))
            layout = f"{name}.weight_format"
            if layout in checkpoint and (kind := int(checkpoint.get(layout, ()))) != 0:
                raise CheckpointError(f"{layout} must be 0 (row-major), got {kind}: weights in a GPU's order")
        elif quantize == "int8":
            weight, absmax, _ = int8_quantize_rows(weight)
            scales.append(absmax)
        else:
            floats.append(name)
        weights.append(weight)
        bias = f"{name}.bias"
        biases.append(checkpoint.floats(bias, (n,)) if bias in checkpoint else None)
    if scales and floats:
        raise CheckpointError(f"{', '.join(floats)} are floats beside int8 layers; load it with int8 quantisation")
    bias_of_all = None
    if any(b is not None for b in biases):
        bias_of_all = torch.cat([torch.zeros(n) if b is None else b for b, n in zip(biases, sizes, strict=True)])
    if scales:
        return Int8Linear(torch.cat(weights), torch.cat(scales), bias_of_all, threshold, group)
    return FloatLinear(torch.cat(weights), bias_of_all)
