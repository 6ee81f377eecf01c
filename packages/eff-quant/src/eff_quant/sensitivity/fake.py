"""Fake quantisation: formats as functions from floats to the floats that they can hold, and layers that apply them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from eff_kernels import fp4_dequantize, fp4_quantize
from torch import Tensor, nn

FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Format:
    """A format of weights and activations.

    Attributes:
        round: The nearest values that the format holds, [..., K] to [..., K], computed in float32.
        bits: Of one element.
        row_bits: Of the scale of one row of K elements, where there is one.
        group: What K has to be a multiple of.
    """

    round: Callable[[Tensor], Tensor]
    bits: float
    row_bits: int = 0
    group: int = 1

    def size(self, rows: int, columns: int) -> float:
        """Bytes of a weight [rows, columns]."""
        return rows * (columns * self.bits + self.row_bits) / 8


def round_mxfp4(x: Tensor) -> Tensor:
    """MXFP4: E2M1 in groups of 32 with a power of two."""
    return fp4_dequantize(fp4_quantize(x, "mxfp4"), "mxfp4", dtype=x.dtype)


def round_nvfp4(x: Tensor) -> Tensor:
    """NVFP4: E2M1 in groups of 16 with an E4M3 scale, and a scale of the whole tensor."""
    return fp4_dequantize(fp4_quantize(x, "nvfp4"), "nvfp4", dtype=x.dtype)


def round_fp8(x: Tensor) -> Tensor:
    """E4M3 with one float32 scale a row."""
    rows = x.float()
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * FP8_MAX) / FP8_MAX
    return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def round_int8(x: Tensor) -> Tensor:
    """Symmetric int8 with one float32 scale a row."""
    rows = x.float()
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return ((rows / scale).round() * scale).to(x.dtype)


FORMATS = {
    "mxfp4": Format(round_mxfp4, 4.25, group=32),
    "nvfp4": Format(round_nvfp4, 4.5, group=16),
    "fp8": Format(round_fp8, 8, row_bits=32),
    "int8": Format(round_int8, 8, row_bits=32),
}


def check_format(name: str) -> None:
    """Raise ValueError for a format that is not in the table."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r}; use one of {', '.join(map(repr, FORMATS))}")


class Inputs:
    """Rounds the inputs of layers; layers that get the same tensor one after another (q, k, v) share the result."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, str, Tensor] | None = None

    def __call__(self, x: Tensor, format: str) -> Tensor:
        """Round ``x`` [..., K], or return what was computed for this very tensor."""
        if self._last is not None:
            last, version, last_format, rounded = self._last
            if last is x and version == x._version and last_format == format:
                return rounded
        rounded = FORMATS[format].round(x)
        self._last = (x, x._version, format, rounded)
        return rounded

    def forget(self) -> None:
        """Let the last tensor go."""
        self._last = None


class Weights:
    """Rounded weights by layer and format, as many as fit into ``limit`` bytes; the longest unused go first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._kept: OrderedDict[tuple[nn.Module, str], Tensor] = OrderedDict()

    def __call__(self, module: nn.Module, format: str) -> Tensor:
        """The weight of a layer [N, K], rounded."""
        key = (module, format)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        weight = FORMATS[format].round(weight_of(module))
        size = weight.numel() * weight.element_size()
        while self._kept and self._used + size > self._limit:
            _, old = self._kept.popitem(last=False)
            self._used -= old.numel() * old.element_size()
        if size <= self._limit:
            self._kept[key] = weight
            self._used += size
        return weight


class FakeLinear(nn.Module):
    """A linear layer with a rounded weight that rounds its input (``format``) or not (None)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, inputs: Inputs, format: str | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._inputs, self._format = inputs, format

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K] to [..., N]."""
        if self._format is not None:
            x = self._inputs(x, self._format)
        return nn.functional.linear(x, self.weight, self.bias)


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias [N] of a linear layer, if it has one."""
    return None if module.bias is None else module.get_parameter("bias").detach()


def weight_of(module: nn.Module) -> Tensor:
    """The weight [N, K] of a linear layer; GPT-2's Conv1D holds it transposed."""
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.T
