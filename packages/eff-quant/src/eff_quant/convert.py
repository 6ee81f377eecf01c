"""Exchanging the layers of a model: what `quantize_` and `dequantize_` do before a library is told of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from eff_kernels.edit import Report, Where, replace_module
from torch import nn

from eff_quant.layer import QuantizedLinear
from eff_quant.linears import Found, find_linears, linear_weight, size_of
from eff_quant.mixed import MixedConfig
from eff_quant.plan import groups_of, name_of, plan, report_plan
from eff_quant.registry import method_of

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
    report = report_plan(action, found)
    shared = _shared(found)
    todo = [f for f in reversed(found) if not f.reason]
    count = len(todo)
    show = progress or _default_progress(sum(f.size for f in todo))
    del found  # so that each layer's old weight is freed as soon as the layer is replaced
    while todo:
        show(count - len(todo), count, todo[-1].names[0])
        f = todo.pop()
        name, method = f.names[0], method_of(f.config)
        _exchange(model, f, method.build(name, f.module, f.config, shared.get(name, {})), report)
        del f
    show(count, count, "")
    return report


def dequantize_layers(model: nn.Module, *, where: Where = "*", dtype: torch.dtype | None = None) -> Report:
    """Replace quantised layers by `nn.Linear`, see `eff_quant.dequantize_`."""
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    report = Report("dequantize_")
    for f in find_linears(model, where=where, done=(QuantizedLinear,)):
        if not isinstance(f.module, QuantizedLinear):
            continue
        if f.wanted:
            report.skip(f.names[0], f.reason, size=f.size)
            continue
        _exchange(model, f, f.module.to_linear(dtype), report)
    return report


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether any layer of a model is quantised."""
    return any(isinstance(m, QuantizedLinear) for m in model.modules())


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
