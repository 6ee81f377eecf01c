"""LoRA on a quantised base: training needs nothing of ours, merging does."""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels.edit import Report, replace_module
from torch import nn

from eff_quant.layer import QuantizedLinear
from eff_quant.linears import size_of, without_wrapper


def merge_lora(peft_model: Any, *, adapter_names: list[str] | None = None) -> tuple[nn.Module, Report]:
    """Merge LoRA adapters into the quantised layers below them and return the model without its PEFT wrapper.

    Each layer is dequantised to float32, PEFT merges, and the sum is quantised again with the layer's own settings.
    That rounds: weights change by up to half a step, so expect small differences. Layers without an adapter keep their
    bytes. PEFT's own ``merge_and_unload`` does the same through ``layer.weight.data``, in the layer's dtype.

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
    layers = {m for m in peft_model.modules() if isinstance(m, QuantizedLinear)}
    below = [(n, m) for n, m in peft_model.named_modules() if m in layers and n.endswith(".base_layer")]
    if not below:
        raise ValueError("no quantised layer has an adapter; PEFT's merge_and_unload merges float layers")
    names = [_inner_name(peft_model, layer) for _, layer in below]
    for name, layer in below:
        linear = layer.to_linear(torch.float32)
        if layer.bias is not None:  # PEFT adds to it in place, which a failed merge must not leave
            linear.bias = nn.Parameter(layer.bias.detach().to(torch.float32, copy=True), layer.bias.requires_grad)
        replace_module(peft_model, name, linear)
    done = False
    try:
        model = peft_model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
        merged = [model.get_submodule(name) for name in names]
        tensors = [layer.requantized_tensors(linear.weight) for (_, layer), linear in zip(below, merged, strict=True)]
        done = True
    finally:
        if not done:  # as it was: the adapters are still attached to the layers, or PEFT has taken some away
            for (name, layer), inner in zip(below, names, strict=True):
                _put_back(peft_model, name, inner, layer)
    report = Report("merge_lora")
    for name, (_, layer), new, linear in zip(names, below, tensors, merged, strict=True):
        size = size_of(layer)
        layer.fill(new)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.data)
        replace_module(model, name, layer)
        report.change(name, bytes_before=size, bytes_after=size_of(layer))
    return model, report


def _inner_name(peft_model: Any, layer: nn.Module) -> str:
    """The name that a layer has without the wrapper."""
    return next(without_wrapper(n) for n, m in peft_model.get_base_model().named_modules() if m is layer)


def _put_back(peft_model: Any, name: str, inner: str, layer: QuantizedLinear) -> None:
    try:
        replace_module(peft_model, name, layer)
    except AttributeError:
        replace_module(peft_model.get_base_model(), inner, layer)
