"""What can be seen at single layers of the unchanged model: outliers of inputs, and errors of rounding."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from eff_kernels.edit import Handle
from torch import Tensor, nn

from eff_quant.sensitivity.fake import FORMATS, weight_of
from eff_quant.sensitivity.passes import Runner

QUANTILE = 0.999

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that servers run as one, which want one format."""

# Outliers are rare and are looked for in all windows; errors are settled by this many tokens, and cost more.
ERROR_TOKENS = 1024


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
    """Run the model as it is, and with it each layer in each format on the same input.

    Args:
        runner: The model and its windows.
        formats: Formats to try, on the first windows, until there are `ERROR_TOKENS` tokens.
        advance: Called after each window.
    """
    watcher = _Watcher(runner)
    tokens = 0
    for ids in runner.windows:
        watcher.formats = tuple(formats) if tokens < ERROR_TOKENS else ()
        with Handle() as handle:
            watcher.put_hooks(handle)
            runner.call(ids)
        tokens += len(ids)
        advance()
    layers = []
    for p in runner.parts.linears:
        s, weight = watcher.sums[p.name], weight_of(p.module)
        layers.append(
            Layer(
                p.name,
                p.block,
                p.component,
                weight.shape[0],
                weight.shape[1],
                largest=s.largest,
                outlier_ratio=s.largest / _quantile(s.histogram, s.largest),
                weight_sqnr={f: _weight_sqnr(weight, f) for f in formats},
                output_sqnr={f: decibel(s.output, s.noise[f]) for f in formats},
                block_error={f: s.block_noise[f] / (watcher.block_output[p.block] or 1.0) for f in formats},
            )
        )
    return layers


class _Watcher:
    """Hooks that look at each layer, and run each block again with one layer rounded."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.formats: tuple[str, ...] = ()
        self.sums = {p.name: _Sums() for p in runner.parts.linears}
        self.block_output = [0.0] * len(runner.blocks)
        self._again = False

    def put_hooks(self, handle: Handle) -> None:
        """Watch until the handle is removed."""
        handle.on_remove(self.runner.inputs.forget)
        for p in self.runner.parts.linears:
            handle.on_remove(p.module.register_forward_hook(partial(self._see_layer, p.name)).remove)
        for i, block in enumerate(self.runner.blocks):
            handle.on_remove(block.register_forward_hook(partial(self._see_block, i), with_kwargs=True).remove)

    def _see_layer(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._again:
            return
        x, sums = args[0], self.sums[name]
        size = x.abs()
        # Absolute bfloat16 values are ordered as their bits, so 2^15 counts give a quantile of any number of values.
        bits = size.to(torch.bfloat16).reshape(-1).view(torch.int16).int()
        counts = torch.bincount(bits, minlength=2**15)
        sums.histogram = counts if sums.histogram is None else sums.histogram + counts
        sums.largest = max(sums.largest, size.max().item())
        if self.formats:
            sums.output += _square(output)
        for format in self.formats:
            sums.noise[format] += _square(self.runner.rounded(name, format)(x).float() - output.float())

    def _see_block(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._again or not self.formats:
            return
        expected = _hidden(output)
        self.block_output[i] += _square(expected)
        inside = len(self.runner.parts.blocks[i]) + 1
        self._again = True
        for p in (p for p in self.runner.parts.linears if p.block == i):
            for format in self.formats:
                with Handle() as handle:
                    handle.replace(module, p.name[inside:], self.runner.rounded(p.name, format))
                    found = _hidden(module(*args, **kwargs))
                self.sums[p.name].block_noise[format] += _square(found.float() - expected.float())
        self._again = False


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
