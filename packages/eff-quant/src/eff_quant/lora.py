"""LoRA on an int8 base: training needs nothing of ours, merging does."""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels.edit import Report, replace_module
from torch import nn

from eff_quant.linears import without_wrapper
from eff_quant.llm_int8.layer import Int8Linear
from eff_quant.quantize import size_of


def merge_lora(peft_model: Any, *, adapter_names: list[str] | None = None) -> tuple[nn.Module, Report]:
    """Merge LoRA adapters into the int8 layers below them and return the model without its PEFT wrapper.

    Each layer is dequantised to float32, PEFT merges, and the sum is quantised again with the layer's own settings.
    That rounds: weights change by up to half a step of int8, so expect small differences. Layers without an adapter
    keep their bytes. PEFT's own ``merge_and_unload`` cannot add to int8: it raises, and with ``safe_merge=True`` it
    rounds the adapter away without a word, so use this function.

    Args:
        peft_model: What ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned.
        adapter_names: Adapters to merge; by default the active ones.

    Returns:
        The base model, changed in place, and the int8 layers that were merged into.

    Raises:
        TypeError: not a PEFT model.
        ValueError: no int8 layer has an adapter, or an adapter holds inf or NaN.
    """
    if not hasattr(peft_model, "merge_and_unload"):
        raise TypeError(f"merge_lora takes a PEFT model, got {type(peft_model).__name__}")
    below = {
        name: module
        for name, module in peft_model.named_modules()
        if isinstance(module, Int8Linear) and name.endswith(".base_layer")
    }
    if not below:
        raise ValueError("no int8 layer has an adapter; PEFT's merge_and_unload merges float layers")
    paths = {}
    base = peft_model.get_base_model()
    inside = {module: name for name, module in base.named_modules()}
    for name, layer in below.items():
        paths[without_wrapper(inside[layer])] = layer
        replace_module(peft_model, name, layer.to_linear(torch.float32))
    model = peft_model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    report = Report("merge_lora")
    for path, old in paths.items():
        columns = () if old.outlier_columns is None else old.outlier_columns.tolist()
        new = Int8Linear.from_linear(model.get_submodule(path), old.config, outlier_columns=columns)
        if new.outlier_weight is not None and old.outlier_weight is not None:
            new.outlier_weight = new.outlier_weight.to(old.outlier_weight.dtype)
        replace_module(model, path, new)
        report.change(path, bytes_before=size_of(old), bytes_after=size_of(new))
    return model, report
