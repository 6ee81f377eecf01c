"""Which layers stay as they are on purpose: skip lists, heads, and what a model class keeps in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eff_kernels.edit import Where, fits
from torch import nn

from eff_quant.linears import without_wrapper

HEADS = "lm_head"
"""The entry of a skip list that stands for the output embedding and for all heads on a base model."""


def on_skip_list(model: nn.Module, skip: Sequence[str], names: Sequence[str], module: nn.Module) -> str:
    """Why a skip list takes a layer in; "" if it does not.

    A pattern selects a layer, or a module with all layers inside.
    """
    around = [name.rsplit(".", n)[0] for name in names for n in range(name.count(".") + 1)]
    if pattern := next((p for p in skip if any(fits(p, name, module) for name in around)), None):
        return f"on the skip list ({pattern})"
    if HEADS in skip and module is output_embedding(model):
        return f"is the output embedding ({HEADS})"
    if HEADS in skip and is_head(model, module):
        return f"is a head on the base model ({HEADS})"
    return ""


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer from hidden states to logits of a vocabulary, where a model says which it is."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def is_head(model: nn.Module, module: nn.Module) -> bool:
    """Whether a layer lies outside of what a transformers model calls its base model (``score``, ``classifier``)."""
    outer = transformers_model(model)
    base = None if outer is None else getattr(outer, getattr(outer, "base_model_prefix", "") or "", None)
    if not isinstance(base, nn.Module) or base is outer:
        return False
    return any(m is module for m in outer.modules()) and not any(m is module for m in base.modules())


def transformers_model(model: nn.Module) -> Any:
    """The outermost model of transformers in a module, told by its classes; None if there is none."""
    for module in model.modules():
        if any(c.__module__ == "transformers.modeling_utils" for c in type(module).__mro__):
            return module
    return None


def diffusers_models(model: nn.Module) -> list[Any]:
    """The models of diffusers in a module, told by their classes."""
    return [
        m for m in model.modules() if any(c.__module__ == "diffusers.models.modeling_utils" for c in type(m).__mro__)
    ]


def in_float32(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether the class of a transformers model keeps a layer in float32, whatever the dtype of the model."""
    outer = transformers_model(model)
    parts = set(getattr(outer, "_keep_in_fp32_modules", None) or ())
    parts |= set(getattr(outer, "_keep_in_fp32_modules_strict", None) or ())
    return any(parts & set(name.split(".")) for name in names)


def check_used(model: nn.Module, skip: Sequence[str], where: Where = "*") -> None:
    """Check that each pattern matches something.

    Raises:
        ValueError: one does not; a misspelt name would be passed over without a word.
    """
    modules = [(without_wrapper(n), m) for n, m in model.named_modules(remove_duplicate=False) if n]
    patterns = [where] if isinstance(where, str) else where if not callable(where) else ()
    for what, given in (("skip", [p for p in skip if p != HEADS]), ("where", [p for p in patterns if p != "*"])):
        if idle := [p for p in given if not any(fits(p, n, m) for n, m in modules)]:
            raise ValueError(f"{what}: {', '.join(map(repr, idle))} matches no module of the model")
