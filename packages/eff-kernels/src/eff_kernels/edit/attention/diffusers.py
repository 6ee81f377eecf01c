"""What attention modules of diffusers tell about their streams: joint ones of SD3 and FLUX, cross-attention of UNets.

Their processors end in ``scaled_dot_product_attention`` (backend "native"), where `sdpa` takes the call. A joint call
holds two streams one after the other; how long each is only the arguments of the module tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from eff_kernels.edit.attention.forward import Forward

# Argument by which a single-stream block tells the attention inside how many text tokens come first.
TEXT = "eff_text_tokens"
# Argument by which FLUX and its like hand their attention the cosines and sines of places.
ROTARY = "image_rotary_emb"
_CARRIER, _CARRIED_AT = "joint_attention_kwargs", 4

_IMAGE_FIRST = ("JointAttn", "FusedJointAttn", "SD3IPAdapterJointAttn", "Mochi")
_TEXT_FIRST = ("Flux", "QwenDouble", "AuraFlow", "FusedAuraFlow")


def is_diffusers_attention(module: nn.Module) -> bool:
    """Whether a module is an attention of diffusers: it works through a processor."""
    # Mochi's has a processor that cannot be exchanged.
    own = callable(getattr(module, "set_processor", None)) or type(module).__module__.startswith("diffusers.")
    return own and callable(getattr(module, "processor", None))


def single_block(names: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """The block around an attention of FLUX that gets both streams joined already, or None."""
    block = names.get(name.rpartition(".")[0])
    if block is None or "SingleTransformerBlock" not in type(block).__name__:
        return None
    order = list(inspect.signature(type(block).forward).parameters)[1:]
    if order[1:2] != ["encoder_hidden_states"] or order[_CARRIED_AT : _CARRIED_AT + 1] != [_CARRIER]:
        return None
    return block if getattr(names[name], "added_kv_proj_dim", None) is None else None


class SingleBlock(Forward):
    """Forward of a single-stream block that lets the attention inside know where the text ends."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        text = _argument(args, kwargs, 1, "encoder_hidden_states")
        given = _argument(args, kwargs, _CARRIED_AT, _CARRIER) or {}
        more = given if text is None else {**given, TEXT: text.shape[1]}
        if len(args) > _CARRIED_AT:
            return self.plain(*args[:_CARRIED_AT], more, *args[_CARRIED_AT + 1 :], **kwargs)
        return self.plain(*args, **{**kwargs, _CARRIER: more})


def joint_attention(model: nn.Module) -> list[str]:
    """Names of the attention modules that join a text and a picture stream, in the order of their blocks.

    Those of SD3, FLUX (single blocks too), Mochi and their kin; their calls carry `AttentionCall.streams`.
    """
    names = dict(model.named_modules())
    return [n for n, m in names.items() if is_diffusers_attention(m) and (_joins(m) or single_block(names, n))]


def _joins(module: nn.Module) -> bool:
    processor = type(module.processor).__name__
    return getattr(module, "add_k_proj", None) is not None and processor.startswith(_IMAGE_FIRST + _TEXT_FIRST)


def leaves_padding(module: nn.Module) -> bool:
    """Whether a joint attention calls once a sample, without the padding of its text."""
    return type(getattr(module, "processor", None)).__name__.startswith("Mochi")


def cut(streams: Mapping[str, slice], length: int) -> Mapping[str, slice] | None:
    """Streams, the picture first, of a call whose text is shorter; None if it does not hold the picture."""
    image = streams["image"].stop
    return None if length < image else _two("image", image, "text", length)


def describe(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, Mapping[str, slice] | None, int | None]:
    """Whether a module attends to another sequence, its streams if it joins two, and their common length."""
    if not is_diffusers_attention(module):
        return named_cross(module, name), None, None
    hidden = _argument(args, kwargs, 0, "hidden_states")
    other = _argument(args, kwargs, 1, "encoder_hidden_states")
    if other is None:
        border, length = kwargs.get(TEXT), hidden.shape[1]
        return False, None if border is None else _two("text", border, "image", length), length
    if hidden.dim() != 3:
        return True, None, None
    image, text = hidden.shape[1], other.shape[1]
    processor = type(getattr(module, "processor", None)).__name__
    streams = None
    if _joins(module):
        if processor.startswith(_IMAGE_FIRST):
            streams = _two("image", image, "text", image + text)
        elif processor.startswith(_TEXT_FIRST):
            streams = _two("text", text, "image", image + text)
    return True, streams, image + text


def _two(first: str, border: int, second: str, end: int) -> Mapping[str, slice]:
    return {first: slice(0, border), second: slice(border, end)}


def named_cross(module: nn.Module, name: str) -> bool:
    """Whether a module of no known library attends to another sequence, by its flags and names."""
    for flag in ("is_cross_attention", "is_cross_attn"):
        if isinstance(value := getattr(module, flag, None), bool) and value:
            return True
    last = (name.rpartition(".")[2] or "").lower()
    near = ".".join(name.split(".")[-2:]).lower()
    return "cross" in near or "cross" in type(module).__name__.lower() or last in ("encoder_attn", "encdecattention")


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return kwargs[name] if name in kwargs else args[place] if len(args) > place else None
