"""Put sparse-linear attention into a model, whatever library it comes from.

A rule of `eff_kernels.edit.attention` answers the self-attention of the chosen modules; projections, norms and rotary
embeddings of the host stay what they are, and so do its state_dict keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from eff_kernels.edit import Handle, Record, Report, Where, fits
from eff_kernels.edit.attention import (
    Attend,
    AttentionCall,
    AttentionOutput,
    Found,
    find_attention,
    intercept_attention,
)
from eff_kernels.edit.attention.diffusers import named_cross
from torch import Tensor, nn

from eff_attention.sparse_linear.config import SLAConfig
from eff_attention.sparse_linear.modules import SparseLinearAttention

NAME = "sla"


def apply_sla(
    model: nn.Module,
    config: SLAConfig | None = None,
    *,
    targets: Where | None = None,
    exclude: Where = (),
    strict: bool = False,
    order: float | None = None,
) -> Handle:
    """Let the self-attention of a model run sparse-linear.

    Each chosen module gets a child ``sla`` with the projection of the linear branch, which answers its attention. A
    module whose attention cannot be reached or that has a causal mask raises when it runs, since otherwise nothing
    would have changed.

    Args:
        model: Any module.
        config: The settings, the same for all; `sla_modules` gives each layer's for other ones.
        targets: Pattern, patterns or predicate of the modules; by default all that
            `eff_kernels.edit.attention.find_attention` reaches.
        exclude: Patterns or predicate of modules to leave, such as "camera_head.*".
        strict: Whether a skipped module is an error.
        order: Place among other rules on the same attention, see `intercept_attention`; no rule may stand inside.

    Returns:
        A handle with a report; ``remove()`` gives the model back. Modules are skipped whose head dimension cannot be
        read, whose attention cannot be reached, or that attend to other tokens.

    Raises:
        ValueError: nothing was chosen, a module has a child ``sla`` already, or another rule on the same attention has
            no other ``order``.
    """
    report, chosen = Report("apply_sla"), {}
    for found in find_attention(model, targets):
        dim = head_dim(found.module)
        if isinstance(found.module, SparseLinearAttention) or NAME in found.module._modules:
            raise ValueError(f"{found.name} has sparse-linear attention already; remove that first")
        if reason := "excluded" if fits(exclude, found.name, found.module) else _reason(found, dim):
            report.skip(found.name, reason)
        elif dim is not None:
            chosen[found.name] = found.module, SparseLinearAttention(dim, config, device=_device(found.module))
            report.change(found.name)
    if strict:
        report.raise_if_skipped()
    if not chosen:
        raise ValueError(f"no attention was found to change\n{report}")
    handle = Handle(report)
    rule = intercept_attention(model, attend_sparse, where=lambda name, module: name in chosen, order=order)
    for host, attention in chosen.values():
        host.add_module(NAME, attention)
        handle.on_remove(functools.partial(host._modules.pop, NAME, None))
    handle.on_remove(rule.remove)
    return handle


def attend_sparse(call: AttentionCall, attend: Attend) -> Tensor | AttentionOutput:
    """The rule: the module's own child answers."""
    attention = call.module._modules[NAME]
    assert isinstance(attention, SparseLinearAttention)
    if attend.inside:
        raise NotImplementedError(
            f"{call.name}: sparse-linear attention answers by itself and never asks the rules inside of it; give it "
            "the highest order"
        )
    if call.causal:
        raise ValueError(f"{call.name} is causal; sparse-linear attention is not")
    more = {"dropout": call.dropout or None, "a softcap": call.softcap, "sinks": call.sinks, "a bias": call.bias}
    if has := [name for name, value in more.items() if value is not None]:
        raise NotImplementedError(f"{call.name} has {has[0]}, which sparse-linear attention does not support")
    if call.mask is None:
        return attention(call.q, call.k, call.v, call.scale)
    if attention.config.fallback != "sdpa":
        raise NotImplementedError(
            f"{call.name}: sparse-linear attention takes no attention mask; give batches without padding, or set "
            "fallback='sdpa' to run masked calls dense"
        )
    attention.ran = "masked"
    return attend(call)


def sla_modules(model: nn.Module) -> Iterator[tuple[str, SparseLinearAttention]]:
    """Name of the host module and its sparse-linear attention, for each layer that has one."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinearAttention):
            yield name.removesuffix(NAME).removesuffix("."), module


def sla_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The projections of all layers, for an optimiser."""
    for _, module in sla_modules(model):
        yield from module.parameters()


def freeze_backbone(model: nn.Module) -> Handle:
    """Let only the projections require gradients; ``remove()`` restores what each parameter had."""
    handle = Handle()
    kept = {id(p) for p in sla_parameters(model)}
    for p in model.parameters():
        handle.on_remove(functools.partial(p.requires_grad_, p.requires_grad))
        p.requires_grad_(id(p) in kept)
    return handle


@dataclass(frozen=True, slots=True)
class SLAWeights(Record):
    """What `save_sla` writes: settings and projections by name of the host module."""

    configs: Mapping[str, SLAConfig]
    projections: Mapping[str, Mapping[str, Tensor]]


def save_sla(model: nn.Module, path: str | Path) -> None:
    """Write the projections and settings of all layers to one safetensors file.

    Raises:
        ValueError: the model has no sparse-linear attention.
    """
    layers = dict(sla_modules(model))
    if not layers:
        raise ValueError("the model has no sparse-linear attention to save")
    SLAWeights({n: m.config for n, m in layers.items()}, {n: m.state_dict() for n, m in layers.items()}).save(path)


def load_sla(model: nn.Module, path: str | Path) -> Handle:
    """Apply what `save_sla` wrote to a model that has none.

    Raises:
        ValueError: the file is not one of `save_sla`, or its layers are not those of the model.
    """
    held = SLAWeights.load(path)
    missing = sorted(set(held.configs) - {n for n, _ in model.named_modules()})
    if missing:
        raise ValueError(f"the model has no modules {missing}, which {path} is for")
    handle = apply_sla(model, targets=lambda name, module: name in held.configs, strict=True)
    try:
        for name, module in sla_modules(model):
            module.config = held.configs[name]
            module.load_state_dict(held.projections[name])
    except Exception:
        handle.remove()
        raise
    return handle


def head_dim(module: nn.Module) -> int | None:
    """Features of one head of an attention module of any library, or None."""
    for name in ("head_dim", "attention_head_size", "dim_head"):
        if isinstance(value := getattr(module, name, None), int):
            return value
    heads = next((h for n in ("num_heads", "num_attention_heads", "heads") if (h := getattr(module, n, None))), None)
    if not isinstance(heads, int):
        return None
    if isinstance(inner := getattr(module, "inner_dim", None), int):
        return inner // heads
    for name, share in (("qkv", 3), ("to_q", 1), ("q_proj", 1), ("query", 1)):
        if isinstance(linear := getattr(module, name, None), nn.Linear):
            return linear.out_features // share // heads
    return None


def _reason(found: Found, dim: int | None) -> str:
    """Why a module is skipped, or an empty text."""
    if getattr(found.module, "is_cross_attention", False) or named_cross(found.module, found.name):
        return "attends to other tokens than its own"
    if not found.way:
        return found.reason
    return "" if dim is not None else f"the head dimension of {type(found.module).__name__} cannot be read"


def _device(module: nn.Module) -> torch.device | None:
    first = next(module.parameters(), None)
    return None if first is None else first.device
