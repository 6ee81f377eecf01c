"""The verb of the package: ``quantize_(model, config)`` rewrites linear layers and reports on each of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from eff_kernels.edit import Report, Where
from torch import nn

from eff_quant.convert import Progress, dequantize_layers, has_quantized_layers, quantize_layers
from eff_quant.method import MethodConfig
from eff_quant.mixed import MixedConfig, as_mixed
from eff_quant.skips import diffusers_models, transformers_model


def quantize_(
    model: nn.Module,
    config: MethodConfig | MixedConfig | Mapping[str, MethodConfig],
    *,
    where: Where = "*",
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Replace linear layers and stacked experts of a model by quantised ones, one by one, so that memory only falls.

    A transformers model also learns that it is quantised, so that ``save_pretrained`` writes a checkpoint that
    `eff_quant.load` and ``from_pretrained`` read back bit for bit.

    Args:
        model: Any module with `nn.Linear` or ``Conv1D`` layers.
        config: Settings, whose class chooses the method (`Int8Config` and its like); or several by layer, as a mapping
            from patterns to settings, in which the first pattern that fits decides.
        where: Layers to quantise: patterns or a predicate, see `eff_kernels.edit.matches`.
        strict: Raise, before anything is changed, if a layer has to be skipped that was not excluded on purpose.
        progress: Called as ``progress(done, total, name)`` with counts of layers. By default a line on the terminal for
            models above 1 GiB.

    Returns:
        Every linear layer, and every module of stacked experts, with its size before and after, or the reason why it
        was left. Experts that their class runs in another way than transformers' interface are listed as skipped.

    Raises:
        TypeError: no method for this class of config.
        ValueError: the config names a layer that is not quantised, a pattern of ``skip`` or ``where`` fits nothing, or
            a weight holds inf or NaN, or all layers are prepared for training (`eff_quant.prepare_qat_`).
        SkippedModulesError: ``strict`` and a layer had to be skipped.
    """
    report = quantize_layers(model, as_mixed(config), where=where, strict=strict, progress=progress)
    if report.changed:
        tell_library(model)
    else:
        _check_not_prepared(model)
    return report


def _check_not_prepared(model: nn.Module) -> None:
    """Refuse a model of which nothing could be stored since all of it is in training."""
    if any(hasattr(module, "fp8_qat") for module in model.modules()):  # the mark of a prepared layer
        raise ValueError(
            "the layers are prepared for training under FP8's noise; convert_qat_ stores them, or remove() that first"
        )


def dequantize_(model: nn.Module, *, where: Where = "*", dtype: torch.dtype | None = None) -> Report:
    """Replace quantised layers by `nn.Linear` with the dequantised weights, and experts by those of their class.

    Args:
        model: Any module.
        where: Layers to rewrite, see `quantize_`.
        dtype: Of the new weights; by default that of the model's first floating parameter, or float32 if it has none.

    Returns:
        Every quantised layer with its size before and after.
    """
    report = dequantize_layers(model, where=where, dtype=dtype)
    tell_library(model)
    return report


def tell_library(model: nn.Module) -> None:
    """Let a model of transformers or diffusers know that it is (no longer) quantised; others are left alone."""
    if (outer := transformers_model(model)) is not None:
        from eff_quant import hf  # imports transformers

        hf.attach(outer) if has_quantized_layers(outer) else hf.detach(outer)
    for part in diffusers_models(model):
        from eff_quant import diffusion  # imports diffusers

        diffusion.attach(part) if has_quantized_layers(part) else diffusion.detach(part)
