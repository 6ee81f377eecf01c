"""Static scales of the activations: over every call of every batch, in the coordinates in which they are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff_quant.quantvla.config import W4A8Config
from eff_quant.quantvla.layer import LayerCalibration, input_rotation
from eff_quant.quantvla.layout import QuantLayout
from eff_quant.quantvla.rotation import BlockRotation, blended_energy, rotate
from eff_quant.quantvla.runs import Run, padding, removed, run_batches

VERSION = "1"
SMALLEST_STEP = 1e-6
# Elements of the float32 copy that a percentile is taken of at a time.
CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class ActivationCalibration:
    """Scales, rotations and orders of the inputs of linear layers.

    Attributes:
        layers: By module name.
        calls: How many calls of layers were seen.
    """

    layers: Mapping[str, LayerCalibration]
    calls: int

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            rotation = layer.rotation
            parts = {
                "input_scale": layer.input_scale,
                "permutation": layer.permutation,
                "rotation": None if rotation is None else rotation.blocks,
                "rotation_tail": None if rotation is None else rotation.tail,
            }
            tensors |= {f"{name}.{leaf}": t.contiguous() for leaf, t in parts.items() if t is not None}
        save_file(tensors, path, metadata={"version": VERSION, "calls": str(self.calls)})

    @classmethod
    def load(cls, path: str | Path) -> ActivationCalibration:
        """Read what `save` wrote.

        Raises:
            ValueError: not such a file, or another version of the format.
        """
        from safetensors import safe_open

        found: dict[str, dict[str, Tensor]] = {}
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("version") != VERSION:
                version = metadata.get("version")
                raise ValueError(f"{path}: calibration of version {version!r}; this eff_quant reads {VERSION!r}")
            for key in f.keys():  # noqa: SIM118 - a safetensors handle is no dict
                name, _, leaf = key.rpartition(".")
                found.setdefault(name, {})[leaf] = f.get_tensor(key)
        layers = {}
        for name, t in found.items():
            rotation = BlockRotation(t["rotation"], t.get("rotation_tail")) if "rotation" in t else None
            layers[name] = LayerCalibration(t["input_scale"], rotation, t.get("permutation"))
        return cls(layers, int(metadata["calls"]))


def calibrate_activations(
    model: nn.Module,
    batches: Iterable[Any],
    layout: QuantLayout,
    config: W4A8Config,
    *,
    run: Run | None = None,
    seed: int = 0,
) -> ActivationCalibration:
    """Run a float model and find the scale of each input column of the layers that the layout takes in.

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
    energies: dict[str, Tensor] = {}
    if config.permute:
        energies, _ = _watch(
            model, batches, layers, run, seed, lambda rows, name: rows.double().square().sum(0), torch.add
        )
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

    totals, counts = _watch(
        model, batches, layers, run, seed, percentile, torch.maximum if config.reduce == "max" else torch.add
    )
    result = {}
    for name, total in totals.items():
        top = total if config.reduce == "max" else total / counts[name]
        result[name] = LayerCalibration((top / 127).clamp_min(SMALLEST_STEP), *turned[name])
    return ActivationCalibration(result, sum(counts.values()))


def _watch(
    model: nn.Module,
    batches: list[Any],
    layers: Mapping[str, nn.Module],
    run: Run | None,
    seed: int,
    look: Callable[[Tensor, str], Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Run all batches; ``look(rows, name)`` of the inputs [tokens, K] of the calls, combined, and their number."""
    seen: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    mask: Tensor | None = None

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            rows = x.reshape(-1, x.shape[-1])
            if mask is not None and x.ndim == 3 and mask.shape == x.shape[:2]:
                rows = rows[mask.reshape(-1)]
            if len(rows):
                found = look(rows, name)
                seen[name] = combine(seen[name], found) if name in seen else found
                counts[name] += 1

        return hook

    with removed([module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]):
        for batch, go in run_batches(model, batches, run, seed):
            mask = padding(batch)
            go()
    if idle := [name for name, count in counts.items() if not count]:
        raise ValueError(f"{len(idle)} layers were never called with the calibration batches, the first is {idle[0]!r}")
    return seen, counts
