"""Putting picture modules beside the text modules of a decoder."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from eff_kernels.edit import Handle, Report
from torch import nn

from eff_adapters.llamafusion.config import ModalityTowerConfig
from eff_adapters.llamafusion.routing import ARGUMENT, LowRankLinear, ModalityModule, current

_CAPPED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def decoder_of(model: Any) -> Any:
    """The Llama-type decoder of a causal model.

    Raises:
        ValueError: the model is of another build; the message says what is missing.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    kind = type(model).__name__
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(decoder, "norm") or not hasattr(model, "lm_head"):
        raise ValueError(f"{kind} is not a Llama-type model: it needs a decoder with layers and norm, and an lm_head")
    for name in _CAPPED:
        if getattr(decoder.config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{kind} scales its logits ({name}); models with plain logits are supported")
    for layer in layers:
        attention: Any = getattr(layer, "self_attn", None)
        if not isinstance(getattr(attention, "o_proj", None), nn.Module) or not isinstance(layer.mlp, nn.Module):
            raise ValueError(f"{kind}: {type(layer).__name__} has no self_attn with an o_proj, or no mlp")
        loose = [n for m in (layer, attention) for n, _ in m.named_parameters(recurse=False)]
        if loose:
            raise ValueError(f"{kind}: {loose} of {type(layer).__name__} belong to no submodule and cannot be routed")
    return decoder


def attach(decoder: Any, config: ModalityTowerConfig) -> Handle:
    """Give each layer, and the final norm, a module of its own for picture tokens: at first a copy of that of text."""
    if config.first_layer >= len(decoder.layers):
        raise ValueError(f"first_layer={config.first_layer}; the model has {len(decoder.layers)} layers")
    handle = Handle(Report("llamafusion"))
    names = ["norm"]
    for i, layer in enumerate(decoder.layers):
        if i < config.first_layer:
            continue
        for name, child in layer.named_children():
            if name == "self_attn":
                if config.separation == "deep":
                    names += [f"layers.{i}.self_attn.{n}" for n, c in child.named_children() if _has_weights(c)]
            elif _has_weights(child):
                names.append(f"layers.{i}.{name}")
    made = {}
    for name in names if config.separation != "none" else []:
        text = decoder.get_submodule(name)
        made[name] = ModalityModule(text, counterpart(text, config.image_rank))
    for name, module in made.items():
        handle.replace(decoder, name, module, back=functools.partial(getattr, module, "text"))
        handle.report.change(name, bytes_before=_size(module.text), bytes_after=_size(module))
    for layer in decoder.layers:
        plain = type(layer)
        layer.__class__ = routed_class(plain)
        handle.on_remove(functools.partial(setattr, layer, "__class__", plain))
    return handle


def counterpart(text: nn.Module, rank: int | None) -> nn.Module:
    """A trainable module for pictures that does at first what the text's does.

    Raises:
        ValueError: the module is quantised and a full copy was asked for.
    """
    frozen = [n for n, p in text.named_parameters() if not p.is_floating_point()]
    if rank is None and frozen:
        raise ValueError(f"{type(text).__name__} has weights that do not train ({frozen[0]}); set image_rank")
    if rank is not None and isinstance(text, nn.Linear):
        return LowRankLinear(text, rank)
    made = copy.deepcopy(text)
    if rank is not None:
        for name, module in list(text.named_modules()):
            if isinstance(module, nn.Linear):
                made.set_submodule(name, LowRankLinear(module, rank))
    return made.requires_grad_()


_ROUTED: dict[type[nn.Module], Any] = {}


def routed_class(plain: Any) -> Any:
    """A decoder layer's class that takes the routing out of its arguments and lets its modules see it.

    A subclass, since gradient checkpointing repeats the forward of a layer's class and none of its hooks.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        token = current.set(kwargs.pop(ARGUMENT, None))
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            current.reset(token)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _blank, (plain,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    if plain not in _ROUTED:
        members = {"forward": forward, "__reduce_ex__": reduce, "__module__": plain.__module__}
        _ROUTED.setdefault(plain, type(plain.__name__, (plain,), members))
    return _ROUTED[plain]


def _blank(plain: type[nn.Module]) -> Any:
    kind = routed_class(plain)
    return kind.__new__(kind)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def picture_modules(decoder: nn.Module) -> dict[str, ModalityModule]:
    """All routed modules of a decoder by name."""
    return {n: m for n, m in decoder.named_modules() if isinstance(m, ModalityModule)}


def tower_parameters(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of picture tokens by name; low-rank layers have only their additions."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in picture_modules(decoder).items()
        for leaf, parameter in module.picture.named_parameters()
    }


def mean_row(weight: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of a table, twice: where new rows start."""
    return weight.detach().float().mean(0, keepdim=True).repeat(2, 1).to(weight.dtype)
