"""The verb of the package: ``quantize_(model, config)`` rewrites linear layers and reports on each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from eff_kernels.edit import Report, Where, replace_module
from torch import nn

from eff_quant.linears import Found, find_linears, linear_weight, size_of
from eff_quant.method import MethodConfig
from eff_quant.mixed import MixedConfig, as_mixed
from eff_quant.plan import groups_of, name_of, plan, report_plan
from eff_quant.registry import LAYERS, method_of

Progress = Callable[[int, int, str], object]

# Models below this size are done before anybody wonders.
QUIET_BELOW = 2**30


def quantize_(
    model: nn.Module,
    config: MethodConfig | MixedConfig | Mapping[str, MethodConfig],
    *,
    where: Where = "*",
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Replace the linear layers of a model by quantised ones, in place and one by one, so that memory only falls.

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
        Every linear layer with its size before and after, or the reason why it was left. Weights of experts stacked in
        one 3-D parameter are no linear layers; they are listed as skipped.

    Raises:
        TypeError: no method for this class of config.
        ValueError: the config names a layer that is not quantised, or a weight holds inf or NaN.
        SkippedModulesError: ``strict`` and a layer had to be skipped.
    """
    rules = as_mixed(config)
    if isinstance(model, (nn.Linear, *LAYERS)):
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
        _exchange(model, f, method.build(name, f.module, f.config, shared.get(name)), report)
        del f
    show(count, count, "")
    if count:
        tell_transformers(model, "attach")
    return report


def dequantize_(model: nn.Module, *, where: Where = "*", dtype: torch.dtype | None = None) -> Report:
    """Replace quantised layers by `nn.Linear` with the dequantised weights, in place.

    Args:
        model: Any module.
        where: Layers to rewrite, see `quantize_`.
        dtype: Of the new weights; by default that of the model's first floating parameter, or float32 if it has none.

    Returns:
        Every quantised layer with its size before and after.
    """
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    report = Report("dequantize_")
    for f in find_linears(model, where=where, done=LAYERS):
        if not isinstance(f.module, LAYERS):
            continue
        if f.wanted:
            report.skip(f.names[0], f.reason, size=f.size)
            continue
        _exchange(model, f, f.module.to_linear(dtype), report)  # type: ignore[operator]
    if not any(isinstance(m, LAYERS) for m in model.modules()):
        tell_transformers(model, "detach")
    return report


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


def tell_transformers(model: nn.Module, what: str) -> None:
    """Let a transformers model know that it is (no longer) quantised; a model of another kind is left alone."""
    for module in model.modules():
        if any(c.__module__ == "transformers.modeling_utils" for c in type(module).__mro__):
            from eff_quant import hf

            getattr(hf, what)(module)
            return
