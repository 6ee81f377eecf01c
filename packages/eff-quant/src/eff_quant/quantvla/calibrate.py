"""Static scales of the activations: over every call of every batch, in the coordinates in which they are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels.edit import ModuleCall, Record, Run, calibrate
from torch import Tensor, nn

from eff_quant.quantvla.config import W4A8Config
from eff_quant.quantvla.layer import LayerCalibration, input_rotation
from eff_quant.quantvla.layout import QuantLayout
from eff_quant.quantvla.rotation import blended_energy, rotate

Combine = Callable[[Tensor, Tensor], Tensor]

SMALLEST_STEP = 1e-6
# Elements of the float32 copy that a percentile is taken of at a time.
CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class ActivationCalibration(Record):
    """Scales, rotations and orders of the inputs of linear layers; it saves as a safetensors file.

    Attributes:
        layers: By module name.
        calls: How many calls of layers were seen.
    """

    layers: Mapping[str, LayerCalibration]
    calls: int


def calibrate_activations(
    model: nn.Module,
    batches: Iterable[Any],
    layout: QuantLayout,
    config: W4A8Config,
    *,
    run: Run | None = None,
    seed: int = 0,
) -> ActivationCalibration:
    """Run a float model and find the scale of each input column of the layers selected by the layout.

    scale = percentile(|x P R|) / 127, at least 1e-6, where the percentiles of all calls are put together by
    ``config.reduce``. With ``config.permute`` the batches are run twice: the order comes first.

    Args:
        model: With float weights; it is run in evaluation mode and left unchanged.
        batches: Each one a mapping of keyword arguments, a tuple of arguments, or a single argument. Tokens that an
            ``attention_mask`` [B, T] of a mapping marks as padding do not count.
        layout: Which layers.
        config: Settings; its skip list is left out as well.
        run: Runs the model on one batch, in place of calling it.
        seed: Of the random numbers that a batch sees.

    Raises:
        ValueError: no batches, no layers, or a layer that was never called; the message names it.
    """
    batches = list(batches)
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {name: modules[name] for name in layout.linears(model)}

    def watch(look: Callable[[Tensor, str], Tensor], combine: Combine) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Run all batches; what ``look`` makes of the inputs [tokens, K] of the calls, combined, and their number."""
        seen: dict[str, Tensor] = {}
        counts = dict.fromkeys(layers, 0)

        def see(call: ModuleCall) -> None:
            if len(rows := call.rows(call.input)):
                found = look(rows, call.name)
                seen[call.name] = combine(seen[call.name], found) if call.name in seen else found
                counts[call.name] += 1

        calibrate(model, batches, dict.fromkeys(layers, see), run=run, seed=seed)
        if idle := [name for name, count in counts.items() if not count]:
            raise ValueError(
                f"{len(idle)} layers were never called with the calibration batches, the first is {idle[0]!r}"
            )
        return seen, counts

    energies: dict[str, Tensor] = {}
    if config.permute:
        energies, _ = watch(lambda rows, name: rows.double().square().sum(0), torch.add)
    turned = {}
    for name, linear in layers.items():
        energy = None
        if config.permute:
            weights = linear.weight.detach().double().square().sum(0)
            energy = blended_energy(energies[name], weights, config.permute_blend)
        turned[name] = input_rotation(linear.weight, config, energy)

    def percentile(rows: Tensor, name: str) -> Tensor:
        rotation, permutation = turned[name]
        rows = rows if permutation is None else rows[:, permutation]
        size = (rows if rotation is None else rotate(rows, rotation)).float().abs()
        step = max(1, CHUNK // max(1, len(size)))
        parts = [torch.quantile(part, config.act_percentile / 100, dim=0) for part in size.split(step, dim=1)]
        return torch.cat(parts)

    totals, counts = watch(percentile, torch.maximum if config.reduce == "max" else torch.add)
    result = {}
    for name, total in totals.items():
        top = total if config.reduce == "max" else total / counts[name]
        result[name] = LayerCalibration((top / 127).clamp_min(SMALLEST_STEP), *turned[name])
    return ActivationCalibration(result, sum(counts.values()))
