"""What can be seen at single layers of the unchanged model: outliers of inputs, and errors of rounding."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit import Handle
from torch import Tensor, nn

from eff_quant.sensitivity.fake import FORMATS, weight_of
from eff_quant.sensitivity.passes import Runner

QUANTILE = 0.999


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer of a sweep.

    Attributes:
        name, block, component: Which it is.
        rows, columns: Shape of its weight, [N, K].
        largest: Of its input, the largest absolute value.
        outlier_ratio: ``largest`` over the 99.9th percentile of absolute values (to bfloat16's precision).
        weight_sqnr: By format, signal to quantisation noise of the weight in dB.
        output_sqnr: By format, that of the layer's output on unchanged input, everything rounded that the sweep rounds.
        block_error: By format, squared error of the block's output if this layer alone is rounded, relative to the
            squared output.
    """

    name: str
    block: int
    component: str
    rows: int
    columns: int
    largest: float
    outlier_ratio: float
    weight_sqnr: Mapping[str, float]
    output_sqnr: Mapping[str, float]
    block_error: Mapping[str, float]


@dataclass(slots=True)
class _Sums:
    histogram: Tensor | None = None
    largest: float = 0.0
    output: float = 0.0
    noise: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    block_noise: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@torch.no_grad()
def measure_layers(runner: Runner, formats: Sequence[str], advance: Callable[[], object]) -> list[Layer]:
    """Run the model as it is, and beside it each layer in each format on the same input.

    Args:
        runner: The model and its windows.
        formats: Formats to try.
        advance: Called after each window.
    """
    sums = {p.name: _Sums() for p in runner.parts.linears}
    block_output = [0.0] * len(runner.blocks)
    names: dict[int, list[str]] = defaultdict(list)
    for p in runner.parts.linears:
        names[p.block].append(p.name)
    with Handle() as handle:
        handle.on_remove(runner.inputs.forget)
        for p in runner.parts.linears:
            hook = _watch_layer(runner, p.name, formats, sums[p.name])
            handle.on_remove(p.module.register_forward_hook(hook).remove)
        for i, block in enumerate(runner.blocks):
            watch = _watch_block(runner, names[i], formats, sums, block_output, i)
            handle.on_remove(block.register_forward_hook(watch, with_kwargs=True).remove)
        for window in range(len(runner.windows)):
            runner.call(window)
            advance()
    layers = []
    for p in runner.parts.linears:
        s, weight = sums[p.name], weight_of(p.module)
        layers.append(
            Layer(
                p.name,
                p.block,
                p.component,
                *weight.shape,
                largest=s.largest,
                outlier_ratio=s.largest / _quantile(s.histogram, s.largest),
                weight_sqnr={f: _weight_sqnr(weight, f) for f in formats},
                output_sqnr={f: decibel(s.output, s.noise[f]) for f in formats},
                block_error={f: s.block_noise[f] / (block_output[p.block] or 1.0) for f in formats},
            )
        )
    return layers


def _watch_layer(runner: Runner, name: str, formats: Sequence[str], sums: _Sums) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0]
        size = x.detach().abs()
        # Absolute bfloat16 values are ordered as their bits, so 2^15 counts give a quantile of any number of values.
        bits = size.to(torch.bfloat16).reshape(-1).view(torch.int16).int()
        counts = torch.bincount(bits, minlength=2**15)
        sums.histogram = counts if sums.histogram is None else sums.histogram + counts
        sums.largest = max(sums.largest, size.max().item())
        sums.output += _square(output)
        for format in formats:
            sums.noise[format] += _square(runner.rounded(name, format)(x).float() - output.float())

    return hook


def _watch_block(
    runner: Runner, names: list[str], formats: Sequence[str], sums: dict[str, _Sums], total: list[float], index: int
) -> Callable[..., None]:
    block_name = runner.parts.blocks[index]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        expected = _hidden(output)
        total[index] += _square(expected)
        for name in names:
            for format in formats:
                with Handle() as handle:
                    handle.replace(module, name[len(block_name) + 1 :], runner.rounded(name, format))
                    found = _hidden(module.forward(*args, **kwargs))  # not by calling it: this hook would run again
                sums[name].block_noise[format] += _square(found.float() - expected.float())

    return hook


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _square(x: Tensor) -> float:
    return x.float().square().sum().item()


def _quantile(histogram: Tensor | None, otherwise: float) -> float:
    if histogram is None:
        return otherwise or 1.0
    below = histogram.cumsum(0)
    rank = math.ceil(QUANTILE * int(below[-1]))
    bits = int(torch.searchsorted(below, rank))
    return torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).item() or otherwise or 1.0


def _weight_sqnr(weight: Tensor, format: str) -> float:
    return decibel(_square(weight), _square(FORMATS[format].round(weight).float() - weight.float()))


def decibel(signal: float, noise: float) -> float:
    """Ratio of two sums of squares in dB; no noise is given as 200 dB, which no format reaches."""
    return min(10 * math.log10(signal / noise), 200.0) if signal > 0 and noise > 0 else 200.0
