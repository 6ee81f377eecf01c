"""LoRA on a quantised base: training needs nothing of ours, merging does."""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels.edit import Report, replace_module
from torch import nn

from eff_quant.linears import size_of, without_wrapper
from eff_quant.registry import LAYERS, method_of


def merge_lora(peft_model: Any, *, adapter_names: list[str] | None = None) -> tuple[nn.Module, Report]:
    """Merge LoRA adapters into the quantised layers below them and return the model without its PEFT wrapper.

    Each layer is dequantised to float32, PEFT merges, and the sum is quantised again with the layer's own settings.
    That rounds: weights change by up to half a step, so expect small differences. Layers without an adapter keep their
    bytes. PEFT's own ``merge_and_unload`` cannot add to codes: with int8 it raises, and with ``safe_merge=True`` it
    rounds the adapter away without a word, so use this function.

    Args:
        peft_model: What ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned.
        adapter_names: Adapters to merge; by default the active ones.

    Returns:
        The base model, changed in place, and the quantised layers that were merged into.

    Raises:
        TypeError: not a PEFT model.
        ValueError: no quantised layer has an adapter, or an adapter holds inf or NaN.
    """
    if not hasattr(peft_model, "merge_and_unload"):
        raise TypeError(f"merge_lora takes a PEFT model, got {type(peft_model).__name__}")
    below = {
        name: module
        for name, module in peft_model.named_modules()
        if isinstance(module, LAYERS) and name.endswith(".base_layer")
    }
    if not below:
        raise ValueError("no quantised layer has an adapter; PEFT's merge_and_unload merges float layers")
    paths = {}
    base = peft_model.get_base_model()
    inside = {module: name for name, module in base.named_modules()}
    for name, layer in below.items():
        paths[without_wrapper(inside[layer])] = layer
        replace_module(peft_model, name, layer.to_linear(torch.float32))  # type: ignore[operator]
    model = peft_model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    report = Report("merge_lora")
    for path, old in paths.items():
        new = method_of(old.config).again(path, model.get_submodule(path), old)
        replace_module(model, path, new)
        report.change(path, bytes_before=size_of(old), bytes_after=size_of(new))
    return model, report
