"""What attention modules of diffusers tell about their streams: joint ones of SD3 and FLUX, cross-attention of UNets.

Their processors end in ``scaled_dot_product_attention`` (backend "native"), where `sdpa` takes the call. A joint call
holds two streams one after the other; how long each is only the arguments of the module tell.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Text tokens at the front of what a single-stream block hands to its attention, for the time of the block's forward.
_text_first: contextvars.ContextVar[int] = contextvars.ContextVar("eff_text_tokens")

_IMAGE_FIRST = ("JointAttn", "PAGJointAttn", "PAGCFGJointAttn", "FusedJointAttn", "SD3")
_TEXT_FIRST = ("Flux", "QwenDouble", "CogVideoX", "AuraFlow", "FusedAuraFlow", "Chroma", "FusedCogVideoX", "CogView4")


def is_diffusers_attention(module: nn.Module) -> bool:
    """Whether a module is an attention of diffusers: it works through an exchangeable processor."""
    return callable(getattr(module, "processor", None)) and callable(getattr(module, "set_processor", None))


def single_block(names: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """The block around an attention of FLUX that gets both streams joined already, or None."""
    block = names.get(name.rpartition(".")[0])
    joins = block is not None and "SingleTransformerBlock" in type(block).__name__
    return block if joins and getattr(names[name], "added_kv_proj_dim", None) is None else None


class SingleBlock:
    """Forward of a single-stream block that lets the attention inside know where the text ends."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.own = block, block.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        forward = self.own if self.own is not None else type(self.block).forward.__get__(self.block)
        text = _argument(args, kwargs, 1, "encoder_hidden_states")
        if text is None:
            return forward(*args, **kwargs)
        token = _text_first.set(text.shape[1])
        try:
            return forward(*args, **kwargs)
        finally:
            _text_first.reset(token)


def describe(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, Mapping[str, slice] | None]:
    """Whether a call of a module is cross-attention, and its streams if it is joint."""
    if not is_diffusers_attention(module):
        return named_cross(module, name), None
    hidden = _argument(args, kwargs, 0, "hidden_states")
    other = _argument(args, kwargs, 1, "encoder_hidden_states")
    processor = type(getattr(module, "processor", None)).__name__
    joint = getattr(module, "added_kv_proj_dim", None) is not None
    if other is None:
        return False, _single(hidden)
    if not joint:
        return True, None
    image, text = hidden.shape[1], other.shape[1]
    if processor.startswith(_IMAGE_FIRST):
        return False, {"image": slice(0, image), "text": slice(image, image + text)}
    if processor.startswith(_TEXT_FIRST):
        return False, {"text": slice(0, text), "image": slice(text, text + image)}
    return False, None


def named_cross(module: nn.Module, name: str) -> bool:
    """Whether a module of no known library attends to another sequence, by its flags and names."""
    for flag in ("is_cross_attention", "is_cross_attn"):
        if isinstance(value := getattr(module, flag, None), bool) and value:
            return True
    last = (name.rpartition(".")[2] or "").lower()
    near = ".".join(name.split(".")[-2:]).lower()
    return "cross" in near or "cross" in type(module).__name__.lower() or last in ("encoder_attn", "encdecattention")


def _single(hidden: Tensor) -> Mapping[str, slice] | None:
    text = _text_first.get(None)
    if text is None or hidden.dim() != 3:
        return None
    return {"text": slice(0, text), "image": slice(text, hidden.shape[1])}


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return kwargs[name] if name in kwargs else args[place] if len(args) > place else None
