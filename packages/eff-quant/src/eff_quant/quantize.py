"""The verb of the package: ``quantize_(model, config)`` rewrites linear layers and reports on each of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels.edit import Report, Where, replace_module
from torch import nn

from eff_quant.linears import Found, find_linears
from eff_quant.llm_int8.config import Int8Config
from eff_quant.llm_int8.layer import Int8Linear

Progress = Callable[[int, int, str], object]

# Models below this size are done before anybody wonders.
QUIET_BELOW = 2**30


@dataclass(frozen=True, slots=True)
class Method:
    """How one quantisation method makes its layers: ``build(name, linear, config)`` returns the new layer."""

    layer: type[nn.Module]
    build: Callable[[str, nn.Module, Any], nn.Module]


def _build_int8(name: str, linear: nn.Module, config: Int8Config) -> nn.Module:
    return Int8Linear.from_linear(linear, config, outlier_columns=config.outlier_columns.get(name, ()))


# A method is chosen by the class of its config; a new method is one more entry.
METHODS: dict[type, Method] = {Int8Config: Method(Int8Linear, _build_int8)}


def quantize_(
    model: nn.Module,
    config: Int8Config,
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
        config: Settings; their class chooses the method.
        where: Layers to quantise: patterns or a predicate, see `eff_kernels.edit.matches`.
        strict: Raise, before anything is changed, if a layer has to be skipped that was not excluded on purpose.
        progress: Called as ``progress(done, total, name)`` with counts of layers. By default a line on the terminal for
            models above 1 GiB.

    Returns:
        Every linear layer with its size before and after, or the reason why it was left. Weights of experts stacked in
        one 3-D parameter are no linear layers; they are listed as skipped.

    Raises:
        TypeError: no method for this class of config.
        ValueError: ``config.outlier_columns`` names a layer that is not quantised, or a weight holds inf or NaN.
        SkippedModulesError: ``strict`` and a layer had to be skipped.
    """
    method = _method(config)
    if isinstance(model, (nn.Linear, method.layer)):
        raise ValueError("the model itself is one linear layer and cannot be replaced in place; use from_linear")
    found = find_linears(model, where=where, skip=config.skip, done=(method.layer,))
    action = f"quantize_ with {type(config).__name__}"
    if strict:
        _raise_if_surprised(action, found)
    check_outlier_columns(config, found)
    report = report_plan(action, found)
    todo = [f for f in reversed(found) if not f.reason]
    count = len(todo)
    show = progress or _default_progress(sum(f.size for f in todo))
    del found  # so that each layer's old weight is freed as soon as the layer is replaced
    while todo:
        show(count - len(todo), count, todo[-1].names[0])
        _exchange(model, todo.pop(), lambda name, linear: method.build(name, linear, config), report)
    show(count, count, "")
    if count:
        tell_transformers(model, "attach", config)
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
    layers = tuple(method.layer for method in METHODS.values())
    report = Report("dequantize_")
    for f in find_linears(model, where=where, done=layers):
        if not isinstance(f.module, layers):
            continue
        if f.wanted:
            report.skip(f.names[0], f.reason, size=f.size)
            continue
        _exchange(model, f, lambda _, layer: layer.to_linear(dtype), report)
    if not any(isinstance(m, layers) for m in model.modules()):
        tell_transformers(model, "detach")
    return report


def _exchange(model: nn.Module, f: Found, build: Callable[[str, Any], nn.Module], report: Report) -> None:
    new = build(f.names[0], f.module)
    for name in f.names:
        replace_module(model, name, new)
    report.change(f.names[0], bytes_before=f.size, bytes_after=size_of(new))


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def check_outlier_columns(config: Int8Config, found: list[Found]) -> None:
    """Check that each module with static outlier columns is one that gets quantised.

    Raises:
        ValueError: one is not; the message names it and the reason.
    """
    reasons = {name: f.reason for f in found for name in f.names}
    for name in config.outlier_columns:
        reason = reasons.get(name, "the model has no linear layer of that name")
        if reason:
            raise ValueError(f"outlier_columns names {name!r}, which is not quantised: {reason}")


def report_plan(action: str, found: list[Found]) -> Report:
    """A report that holds the layers that stay as they are."""
    report = Report(action)
    for f in found:
        if f.reason:
            report.skip(f.names[0], f.reason, size=f.size)
    return report


def _method(config: object) -> Method:
    method = METHODS.get(type(config))
    if method is None:
        known = ", ".join(c.__name__ for c in METHODS)
        raise TypeError(f"no quantisation method for a {type(config).__name__}; use {known}")
    return method


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


def tell_transformers(model: nn.Module, what: str, *args: object) -> None:
    """Let a transformers model know that it is (no longer) quantised; a model of another kind is left alone."""
    for module in model.modules():
        if any(c.__module__ == "transformers.modeling_utils" for c in type(module).__mro__):
            from eff_quant import hf

            getattr(hf, what)(module, *args)
            return
