"""From a model that was trained with the noise of FP8 to one that stores FP8."""

from __future__ import annotations

from typing import Literal, get_args

from eff_kernels.edit import Report, replace_module
from torch import nn

from eff_quant.fp8_qat.config import FP8Config, FP8QATConfig, FP8Spec
from eff_quant.fp8_qat.layer import FP8Linear
from eff_quant.fp8_qat.qat import qat_layers, unprepare
from eff_quant.quantize import tell_library
from eff_quant.settings import check_choice

Target = Literal["fp8_weight_only", "fp8_dynamic", "plain"]


def convert_qat_(model: nn.Module, target: Target = "fp8_weight_only", *, allow_mismatch: bool = False) -> Report:
    """Put stored FP8 in the place of prepared layers, in place.

    Args:
        model: A module that `prepare_qat_` changed.
        target: ``"fp8_weight_only"`` and ``"fp8_dynamic"`` make `FP8Linear` layers, the latter with rounded inputs;
            ``"plain"`` makes `nn.Linear` layers with the trained weights. A transformers model also learns that it is
            quantised, so that ``save_pretrained`` writes what `eff_quant.load` reads.
        allow_mismatch: Convert layers that computed something else in training than they will from now on.

    Returns:
        Every linear layer with its size before and after, or why it was left.

    Raises:
        ValueError: no layer is prepared, the target is unknown, or a layer was prepared for something else than the
            target; nothing is changed then. Or a weight holds inf or NaN.
    """
    check_choice("target", target, get_args(Target))
    layers = list(qat_layers(model))
    if not layers:
        raise ValueError("the model has no prepared layers; use prepare_qat_ first")
    wrong = [f"{name}: {text}" for name, m in layers if (text := _mismatch(m.fp8_qat.config, target))]
    if wrong and not allow_mismatch:
        raise ValueError(
            f"{len(wrong)} layers were prepared for another target than {target!r}; allow_mismatch=True converts them "
            "anyway\n  " + "\n  ".join(wrong)
        )
    report = Report(f"convert_qat_ to {target}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(module is m for _, m in layers):
            report.skip(name, "is not prepared", size=_size(module))
    for name, layer in layers:
        config, before = layer.fp8_qat.config, _size(layer)
        new: nn.Module = layer
        unprepare(layer)
        if target != "plain":
            new = FP8Linear.from_linear(layer, _storage(config, target))
            replace_module(model, name, new)
        report.change(name, bytes_before=before, bytes_after=_size(new))
    if target != "plain":
        tell_library(model)
    return report


def _mismatch(config: FP8QATConfig, target: Target) -> str:
    """What a layer computed in training and the target does not; empty if it is the same."""
    if target == "plain":
        return ""
    if config.weight.granularity != "row":
        return f"weights were rounded with a scale for each {config.weight.granularity}, stored is one for each row"
    if target == "fp8_weight_only" and config.activation is not None:
        return "inputs were rounded, the target leaves them; prepare with activation=None or use 'fp8_dynamic'"
    wanted = FP8Spec(dtype=config.weight.dtype)
    if target == "fp8_dynamic" and config.activation != wanted:
        return f"inputs were prepared with {config.activation}, the target rounds them with {wanted}"
    return ""


def _storage(config: FP8QATConfig, target: Target) -> FP8Config:
    return FP8Config(
        activations="dynamic" if target == "fp8_dynamic" else "none",
        dtype=config.weight.dtype,
        power_of_two=config.weight.power_of_two,
        skip=config.skip,
    )


def _size(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
