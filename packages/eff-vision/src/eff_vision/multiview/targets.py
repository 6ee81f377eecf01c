"""Attention layers of multi-view models, and what swapping them saves: Lite3R's list (arXiv 2605.11354, section 3)."""

from __future__ import annotations

from typing import Literal

from torch import nn

Group = Literal["all", "encoder", "frame", "global", "camera"]
_NAMES = {"Attention", "MemEffAttention"}
_PLACES = {
    "encoder": ("patch_embed.", "pretrained.", "backbone.", "encoder."),
    "frame": ("frame_blocks.",),
    "global": ("global_blocks.",),
    "camera": ("camera_head.", "cam_enc."),
}


def attention_layers(model: nn.Module, group: Group = "all") -> dict[str, nn.Module]:
    """Softmax attention modules by name, in order: those of classes Attention and MemEffAttention with ``qkv``.

    Args:
        model: A `MultiViewTransformer`, VGGT or Depth Anything 3.
        group: Where to look.

    Raises:
        ValueError: there is none, or the group is unknown.
    """
    if group != "all" and group not in _PLACES:
        raise ValueError(f"group={group!r}; use 'all' or one of {sorted(_PLACES)}")
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in _NAMES
        and hasattr(module, "qkv")
        and (group == "all" or any(place in name for place in _PLACES[group]))
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layers in group {group!r}")
    return found


def head_dims(layers: dict[str, nn.Module]) -> dict[str, int]:
    """Width of a head of each layer."""
    found = {}
    for name, layer in layers.items():
        heads = getattr(layer, "num_heads", None)
        width = getattr(getattr(layer, "proj", None), "in_features", None)
        if not isinstance(heads, int) or not isinstance(width, int):
            raise ValueError(f"{name} does not say how many heads it has or how wide it is")
        found[name] = width // heads
    return found


def projection_parameters(layers: dict[str, nn.Module]) -> int:
    """Numbers that Lite3R trains: one matrix of head_dim x head_dim for each layer."""
    return sum(d * d for d in head_dims(layers).values())
