"""Which attention layers of a model can attend to style, and what they are like."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from eff_kernels.edit import fits
from torch import Tensor, nn

_STYLE_BLOCK = "up_blocks.0.attentions.1."


def style_layers(model: nn.Module, layers: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """Attention modules by name, see `StyleAttentionConfig.layers`.

    Raises:
        ValueError: the model has none, or a name fits none of them.
    """
    found = _candidates(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no cross-attention to text that style could be added to; wanted a UNet or a "
            "transformer of diffusers"
        )
    unet = any(name.startswith("up_blocks.") for name in found)
    if layers == "all":
        return found
    if layers == "decoder":
        if unet:
            return {n: m for n, m in found.items() if n.startswith("up_blocks.")}
        names = list(found)
        return {n: found[n] for n in names[len(names) // 2 :]}
    if layers == "style_block":
        chosen = {n: m for n, m in found.items() if n.startswith(_STYLE_BLOCK)}
        if not chosen:
            raise ValueError(f"layers='style_block': this {type(model).__name__} has no {_STYLE_BLOCK[:-1]}")
        return chosen
    patterns = (layers,) if isinstance(layers, str) else layers
    for pattern in patterns:
        if not any(_fits(pattern, n, m) for n, m in found.items()):
            raise ValueError(f"layers={pattern!r} fits none of the layers with text: {', '.join(found)}")
    return {n: m for n, m in found.items() if any(_fits(p, n, m) for p in patterns)}


def _fits(pattern: str, name: str, module: nn.Module) -> bool:
    return fits(pattern, name, module) or name.startswith(pattern + ".")


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    found = {n: m for n, m in model.named_modules() if is_joint(m) and n.startswith("transformer_blocks.")}
    if found:
        return found
    return {n: m for n, m in model.named_modules() if n.endswith("attn2") and hasattr(m, "to_k")}


def is_joint(module: Any) -> bool:
    """Whether an attention joins two streams, each with projections of its own."""
    return getattr(module, "added_kv_proj_dim", None) is not None and hasattr(module, "add_k_proj")


def projections(module: Any) -> tuple[Any, Any]:
    """The layers that make keys and values of the text."""
    return (module.add_k_proj, module.add_v_proj) if is_joint(module) else (module.to_k, module.to_v)


def key_norm(module: Any) -> Any:
    """What normalises the text's keys, or None."""
    return getattr(module, "norm_added_k" if is_joint(module) else "norm_k", None)


@torch.no_grad()
def matrix_of(linear: Any) -> Tensor:
    """The matrix [out, in] that a linear layer amounts to: quantised, adapted or cast, it is asked, not read."""
    like = next(itertools.chain(linear.parameters(), linear.buffers()))  # quantised ones may have buffers alone
    dtype = like.dtype if like.is_floating_point() and like.dtype.itemsize > 1 else torch.float32
    width = linear.in_features
    eye = torch.eye(width, device=like.device, dtype=dtype)
    answer: Tensor = linear(eye) - linear(torch.zeros(1, width, device=like.device, dtype=dtype))
    return answer.T
