"""The verbs: quantise the layers of a layout, and do all of QuantVLA in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from eff_kernels.edit import Report, Run
from torch import nn

from eff_quant.convert import exchange_layers
from eff_quant.method import Method
from eff_quant.mixed import as_mixed
from eff_quant.plan import plan
from eff_quant.quantize import tell_library
from eff_quant.quantvla.apply import ScaleHandle, apply_scale_table
from eff_quant.quantvla.calibrate import ActivationCalibration, calibrate_activations
from eff_quant.quantvla.config import W4A8Config
from eff_quant.quantvla.layer import W4A8Linear
from eff_quant.quantvla.layout import QuantLayout
from eff_quant.quantvla.scales import ScaleMatchConfig, ScaleTable, calibrate_scales
from eff_quant.quantvla.stats import collect_attention_stats, find_attention
from eff_quant.registry import register


def quantize_layout_(
    model: nn.Module, layout: QuantLayout, config: W4A8Config, calibration: ActivationCalibration | None = None
) -> Report:
    """Replace the linear layers selected by a layout by `W4A8Linear`, in place.

    A model of transformers or diffusers saves and loads afterwards as after `eff_quant.quantize_`.

    Args:
        model: Any module.
        layout: Which layers. Its bits for the weights have to be those of ``config``.
        config: Settings.
        calibration: From `calibrate_activations`, for ``activation="static_folded"``.

    Returns:
        Every linear layer with its size before and after (codes, scales, rotations, bias), or the reason why it was
        left.

    Raises:
        ValueError: a pattern fits no layer, a layer cannot be quantised or is so already, or its calibration is
            missing, and nothing has been changed then; or a weight holds inf or NaN.
    """
    if layout.bits[0] != config.weight_bits:
        raise ValueError(f"the layout has bits={layout.bits}, the config weight_bits={config.weight_bits}")
    layout.linears(model)
    static = config.activation == "static_folded"
    known = calibration.layers if calibration is not None and static else {}
    found = plan(model, as_mixed(config), where=layout)
    if refused := [f for f in found if f.reason and not f.wanted and any(layout(n) for n in f.names)]:
        raise ValueError(f"{refused[0].names[0]} {refused[0].reason}")
    shared = {f.names[0]: {"calibration": known[n]} for f in found for n in f.names if not f.reason and n in known}
    if missing := [f.names[0] for f in found if static and not f.reason and f.names[0] not in shared]:
        raise ValueError(
            f"activation='static_folded' and no calibration of {len(missing)} layers such as {missing[0]!r}"
        )
    report = exchange_layers(model, f"quantize_layout_ with {config.weight_bits}-bit weights", found, shared)
    tell_library(model)
    return report


class QuantizedPolicy(NamedTuple):
    """What `calibrate_vla` made, in addition to the model that it changed.

    Attributes:
        report: The layers.
        calibration: The static scales, None with dynamic ones.
        table: The factors of the attention modules, to be saved with the model.
        handle: Takes the factors (not the quantisation) back.
    """

    report: Report
    calibration: ActivationCalibration | None
    table: ScaleTable
    handle: ScaleHandle


def calibrate_vla(
    teacher: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    layout: QuantLayout,
    config: W4A8Config | None = None,
    *,
    match: ScaleMatchConfig | None = None,
    run: Run | None = None,
    seed: int = 0,
) -> QuantizedPolicy:
    """Quantise a policy by QuantVLA: the layout's layers in place, then attention scales matched and folded.

    Args:
        teacher: The policy in full precision; it is left unchanged.
        model: A copy of it, which is changed.
        batches: Some 32 observations without labels; each a mapping of keyword arguments, a tuple, or one argument.
        layout: Layers to quantise and attention modules to calibrate.
        config: Settings of the layers.
        match: Settings of the attention scales.
        run: Runs a policy on one batch, such as all its denoising steps, in place of calling it.
        seed: Of the noise that a batch starts from, the same for teacher and student.

    Raises:
        ValueError: teacher and model are one module, or as in `calibrate_activations`, `quantize_layout_`,
            `collect_attention_stats` and `apply_scale_table`.
    """
    if teacher is model:
        raise ValueError("teacher and model are the same module; quantise a copy.deepcopy of the teacher")
    config, match = config or W4A8Config(weight_bits=4 if layout.bits[0] == 4 else 8), match or ScaleMatchConfig()
    batches = list(batches)
    names = list(find_attention(teacher, layout.attention))
    calibration = None
    if config.activation == "static_folded":
        calibration = calibrate_activations(teacher, batches, layout, config, run=run, seed=seed)
    report = quantize_layout_(model, layout, config, calibration)
    wanted = collect_attention_stats(teacher, batches, layout.attention, std=match.std, run=run, seed=seed)
    handle = ScaleHandle()
    if not match.sequential:
        found = collect_attention_stats(model, batches, layout.attention, std=match.std, run=run, seed=seed)
        table = calibrate_scales(wanted, found, match)
        return QuantizedPolicy(report, calibration, table, apply_scale_table(model, table))
    entries = {}
    for name in names:
        found = collect_attention_stats(model, batches, layout.attention, std=match.std, run=run, seed=seed)
        entries[name] = calibrate_scales(wanted, found, match).modules[name]
        step = apply_scale_table(model, ScaleTable({name: entries[name]}))
        handle.on_remove(step.remove)
        handle.report.changed += step.report.changed
        handle.report.skipped += step.report.skipped
    return QuantizedPolicy(report, calibration, ScaleTable(entries), handle)


# How `quantize_` and the loaders see these layers; static scales come from `quantize_layout_` alone.
METHOD = register(Method(config=W4A8Config, layer=W4A8Linear, bytes_per_weight=lambda config: config.weight_bits / 8))
