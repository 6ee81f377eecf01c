"""The largest activation that each linear layer receives, for static FP4 activations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from eff_kernels.edit import ModuleCall, Record, Where, calibrate, select
from torch import Tensor, nn

from eff_quant.fp4.layer import FP4Linear
from eff_quant.fp4.weight import reciprocal_scale
from eff_quant.linears import is_linear


@dataclass(frozen=True, slots=True)
class InputRanges(Record):
    """What `calibrate_fp4` saw.

    Attributes:
        tokens: How many tokens were seen, without padding.
        amax: The largest magnitude in the input of each linear layer, by name.
    """

    tokens: int
    amax: Mapping[str, float]

    def set_input_scales(self, model: nn.Module) -> None:
        """Give each FP4 layer with static activations the scale of its input.

        Raises:
            ValueError: no such layer, or one that was not seen; the message names it.
        """
        layers = [(n, m) for n, m in select(model, kind=FP4Linear) if m.config.activations == "static"]
        if not layers:
            raise ValueError(
                "the model has no FP4Linear with activations='static'; quantise it with such a config first"
            )
        if missing := [name for name, _ in layers if name not in self.amax]:
            raise ValueError(f"no calibrated input for {missing}; the ranges hold {sorted(self.amax)}")
        for name, layer in layers:
            amax = torch.tensor(self.amax[name], dtype=torch.float32, device=layer.weight_packed.device)
            layer.input_global_scale = reciprocal_scale(amax)

    def check(self) -> None:
        """See the class."""
        if wrong := [n for n, a in self.amax.items() if not (math.isfinite(a) and a >= 0)]:
            raise ValueError(f"the ranges of {wrong} are not finite numbers of 0 or more")


def calibrate_fp4(model: nn.Module, batches: Iterable[Any], *, where: Where = "*") -> InputRanges:
    """Run a model on some batches and record the largest magnitude in the input of each linear layer.

    Calibrate the float model before it is quantised, or one with FP4 weights; activations are never rounded meanwhile.

    Args:
        model: Any module; it is run in evaluation mode and left as it was.
        batches: Each one a mapping of keyword arguments, a tuple of arguments, or a single argument. Tokens that an
            ``attention_mask`` [B, T] of a mapping marks as padding do not count.
        where: Layers to look at.

    Raises:
        ValueError: no tokens, or an input that holds inf or NaN; the message names the layer.
    """
    seen: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(call: ModuleCall) -> None:
        if not len(rows := call.rows(call.input)):
            return
        largest = rows.abs().amax().float()
        seen[call.name] = torch.maximum(seen[call.name], largest) if call.name in seen else largest
        tokens[call.name] = tokens.get(call.name, 0) + len(rows)

    layers = [n for n, m in select(model, where, nn.Module) if is_linear(m)]
    with _float_activations(model):
        calibrate(model, batches, dict.fromkeys(layers, see))
    if not seen:
        raise ValueError("calibrate_fp4 saw no tokens: no linear layer selected by where was run")
    amax = {name: float(value) for name, value in seen.items()}
    if wrong := [name for name, value in amax.items() if not math.isfinite(value)]:
        raise ValueError(f"the input of {wrong[0]} holds inf or NaN; check the model and the batches")
    return InputRanges(max(tokens.values()), amax)


@contextmanager
def _float_activations(model: nn.Module) -> Iterator[None]:
    """Let FP4 layers run with unrounded activations, which need no scale yet."""
    configs = {m: m.config for m in model.modules() if isinstance(m, FP4Linear)}
    for layer, config in configs.items():
        layer.config = replace(config, activations=None)
    try:
        yield
    finally:
        for layer, config in configs.items():
            layer.config = config
