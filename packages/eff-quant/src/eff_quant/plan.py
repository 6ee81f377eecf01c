"""What is to be done with each linear layer and experts: settings, or the reason to leave them, and the group."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from eff_kernels.edit import Report, Where
from torch import nn

from eff_quant.experts import QuantizedExperts
from eff_quant.layer import QuantizedLinear
from eff_quant.linears import Found, find_linears, without_wrapper
from eff_quant.mixed import MixedConfig
from eff_quant.registry import method_of
from eff_quant.skips import check_used, in_float32, on_skip_list
from eff_quant.stacked import is_experts, matrix_shapes, routers_of

QUANTIZED = (QuantizedLinear, QuantizedExperts)
"""What a model holds once it is quantised."""


def plan(
    model: nn.Module,
    config: MixedConfig,
    *,
    where: Where = "*",
    stored: Collection[str] | None = None,
    loading: bool = False,
) -> list[Found]:
    """List the linear layers of a model in its order, each with its settings or the reason why it stays as it is.

    The plan is the same for a model in memory and for one whose weights are still to be read.

    Args:
        model: Any module; its tensors may be on the meta device.
        config: Settings by layer.
        where: Layers to quantise; others are left as the caller wants.
        stored: The layers that a checkpoint holds quantised, by name: these become quantised, and no others.
        loading: Whether weights on the meta device are still to be read, and not held elsewhere.

    Raises:
        ValueError: settings name a layer that is not there or is left, a pattern fits nothing, or a checkpoint holds a
            layer quantised that cannot be.
    """

    def leave(names: Sequence[str], module: nn.Module) -> str:
        chosen = config.config_for(known_as(names), module)
        if stored is not None:
            return "" if any(n in stored for n in names) else "is not quantised in the checkpoint"
        if chosen is None:
            return "no rule takes it in"
        if reason := on_skip_list(model, chosen.skip, names, module):
            return reason
        if module in routers:
            return "chooses between experts (routers stay float)"
        return "is kept in float32 by its model class" if in_float32(model, names) else ""

    routers = routers_of(model)
    prefix = "" if stored is None else f"{getattr(model, 'base_model_prefix', '')}."

    def known_as(names: Sequence[str]) -> Sequence[str]:
        """Settings that were saved with another class of the same model name layers with or without its prefix."""
        return (
            names if stored is None else [n for name in names for n in (name, prefix + name, name.removeprefix(prefix))]
        )

    if stored is None:
        check_used(model, [p for _, c in config.rules for p in c.skip], where)
    found = []
    for f in find_linears(model, where=where, leave=leave, done=QUANTIZED, loading=loading, experts=True):
        chosen = config.config_for(known_as([without_wrapper(n) for n in f.names]), f.module)
        reason = f.reason
        if not reason:
            reason = "no rule takes it in" if chosen is None else refusal(f, chosen)
        if reason and stored is not None and any(n in stored for n in f.names):
            raise ValueError(
                f"the checkpoint holds {f.names[0]} quantised, which {reason}; correct quantization_config"
            )
        found.append(f if f.reason else replace(f, reason=reason, config=chosen))
    for _, settings in config.rules:
        others = "has other settings"
        own = [f if f.reason or f.config is settings else replace(f, reason=others) for f in found]
        method_of(settings).check(settings, own)
    return found


def refusal(f: Found, config: Any) -> str:
    """Why a method cannot hold a layer or experts of this shape with these settings; "" if it can."""
    method = method_of(config)
    if not is_experts(f.module):
        return method.refuse(f.module, config)
    for name in f.names:
        if reason := method.experts(name, config):
            return reason
    for name, (n, k) in matrix_shapes(f.module).items():
        if reason := method.refuse(nn.Linear(k, n, bias=False, device="meta"), config):
            return f"{name}: {reason}"
    return ""


def config_of(module: Any) -> Any:
    """The settings of a quantised layer, or of quantised experts."""
    return module.quantization if isinstance(module, QuantizedExperts) else module.config


def groups_of(found: Sequence[Found]) -> dict[str, tuple[str, ...]]:
    """For each layer that shares something with others, the names of all members of its group.

    Layers belong together if their method says so of the last parts of their names, they have the same parent and the
    same settings.
    """
    groups: dict[str, tuple[str, ...]] = {}
    todo = {without_wrapper(f.names[0]): f for f in found if not f.reason}
    for name, f in todo.items():
        parent, dot, leaf = name.rpartition(".")
        for leaves in method_of(f.config).groups(f.config):
            names = [parent + dot + other for other in leaves]
            members = [todo[n].names[0] for n in names if n in todo and todo[n].config == f.config]
            if leaf in leaves and len(members) > 1:
                groups[f.names[0]] = tuple(members)
    return groups


def report_plan(action: str, found: Sequence[Found]) -> Report:
    """A report that holds the layers that stay as they are."""
    report = Report(action)
    for f in found:
        if f.reason:
            report.skip(f.names[0], f.reason, size=f.size)
    return report


def exactly(name: str) -> str:
    """A pattern that matches only the layer of this name."""
    return f"re:{re.escape(name)}"


def name_of(config: MixedConfig) -> str:
    """The classes of the settings, for reports."""
    return ", ".join(dict.fromkeys(type(c).__name__ for _, c in config.rules))


def settings_of(model: nn.Module) -> list[Any]:
    """The different settings of a model's quantised layers, without their skip lists, in the model's order."""
    different: list[Any] = []
    for module in model.modules():
        if isinstance(module, QUANTIZED):
            config = replace(config_of(module), skip=())
            if config not in different:
                different.append(config)
    return different


def saved_settings(model: nn.Module) -> Any:
    """The settings of all layers as they are saved with a model: one config or rules by layer.

    Raises:
        ValueError: there are no quantised layers.
    """
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, QUANTIZED)}
    if not layers:
        raise ValueError("the model has no quantised layers; use quantize_ first")
    different = settings_of(model)
    if len(different) > 1:
        of = {name: replace(config_of(m), skip=()) for name, m in layers.items()}
        names = [tuple(exactly(n) for n, c in of.items() if c == config) for config in different]
        return MixedConfig(tuple(zip(names, different, strict=True)))
    config = config_of(next(iter(layers.values())))
    skip = tuple(p for p in config.skip if not any(on_skip_list(model, (p,), (n,), m) for n, m in layers.items()))
    found = find_linears(model, leave=partial(on_skip_list, model, skip), done=QUANTIZED, experts=True)
    return replace(config, skip=(*skip, *(exactly(f.names[0]) for f in found if not f.reason)))
