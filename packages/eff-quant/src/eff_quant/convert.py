"""Exchanging the layers of a model: what `quantize_` and `dequantize_` do before a library is told of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from eff_kernels.edit import Report, Where, replace_module
from torch import nn

from eff_quant.experts import QuantizedExperts
from eff_quant.layer import QuantizedLinear
from eff_quant.linears import Found, find_linears, linear_weight, size_of
from eff_quant.mixed import MixedConfig
from eff_quant.plan import QUANTIZED, groups_of, name_of, plan, report_plan
from eff_quant.registry import method_of
from eff_quant.stacked import is_experts

Progress = Callable[[int, int, str], object]

# Models below this size are done before anybody wonders.
QUIET_BELOW = 2**30


def quantize_layers(
    model: nn.Module, rules: MixedConfig, *, where: Where, strict: bool, progress: Progress | None
) -> Report:
    """Replace linear layers by quantised ones, see `eff_quant.quantize_`."""
    if isinstance(model, nn.Linear):
        raise ValueError("the model itself is one linear layer and cannot be replaced in place; use from_linear")
    found = plan(model, rules, where=where)
    action = f"quantize_ with {name_of(rules)}"
    if strict:
        _raise_if_surprised(action, found)
    return exchange_layers(model, action, found, _shared(found), progress)


def exchange_layers(
    model: nn.Module,
    action: str,
    found: list[Found],
    shared: Mapping[str, Any],
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan, which is used up; ``shared`` holds arguments for the tensors of layers, by name."""
    report = report_plan(action, found)
    todo = [f for f in reversed(found) if not f.reason]
    count = len(todo)
    show = progress or _default_progress(sum(f.size for f in todo))
    found.clear()  # so that each layer's old weight is freed as soon as the layer is replaced
    while todo:
        show(count - len(todo), count, todo[-1].names[0])
        f = todo.pop()
        _exchange(model, f, _quantized(f, shared.get(f.names[0], {})), report)
        del f
    show(count, count, "")
    return report


def dequantize_layers(model: nn.Module, *, where: Where = "*", dtype: torch.dtype | None = None) -> Report:
    """Replace quantised layers by `nn.Linear`, see `eff_quant.dequantize_`."""
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    report = Report("dequantize_")
    for f in find_linears(model, where=where, done=QUANTIZED, experts=True):
        if not isinstance(f.module, QUANTIZED):
            continue
        if f.wanted:
            report.skip(f.names[0], f.reason, size=f.size)
            continue
        held = f.module
        new = held.to_experts(dtype) if isinstance(held, QuantizedExperts) else held.to_linear(dtype)
        _exchange(model, f, new, report)
    return report


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether any layer of a model is quantised."""
    return any(isinstance(m, QUANTIZED) for m in model.modules())


def empty_module(f: Found) -> QuantizedLinear | QuantizedExperts:
    """The unfilled replacement of a layer or of experts."""
    if is_experts(f.module):
        return QuantizedExperts.empty_like(f.module, f.config)
    return method_of(f.config).empty(f.names[0], f.module, f.config)


def _quantized(f: Found, shared: Mapping[str, Any]) -> nn.Module:
    if is_experts(f.module):
        return QuantizedExperts.from_experts(f.module, f.config)
    return method_of(f.config).build(f.names[0], f.module, f.config, shared)


def _exchange(model: nn.Module, f: Found, new: nn.Module, report: Report) -> None:
    for name in f.names:
        replace_module(model, name, new)
    report.change(f.names[0], bytes_before=f.size, bytes_after=size_of(new))


def _shared(found: list[Found]) -> dict[str, Any]:
    """What groups of layers share, by the name of each layer in one."""
    layers = {f.names[0]: f for f in found}
    shared: dict[str, Any] = {}
    for name, members in groups_of(found).items():
        if name not in shared:
            config = layers[name].config
            value = method_of(config).share([linear_weight(layers[m].module) for m in members], config)
            shared.update(dict.fromkeys(members, value))
    return shared


def _raise_if_surprised(action: str, found: list[Found]) -> None:
    report = Report(action)
    for f in found:
        if f.reason and not f.wanted:
            report.skip(f.names[0], f.reason)
    report.raise_if_skipped()


def _default_progress(size: int) -> Progress:
    if size < QUIET_BELOW or not sys.stderr.isatty():
        return lambda done, total, name: None

    def show(done: int, total: int, name: str) -> None:
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r\x1b[Kquantize_: {done}/{total} layers {name}{end}")
        sys.stderr.flush()

    return show
