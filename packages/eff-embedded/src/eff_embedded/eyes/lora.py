"""LoRA that acts only from a sequence's first picture on, so that text alone gets the base model bit for bit.

Which tokens lie behind a picture is worked out once for each call of the LLaVA model, from its token ids and its cache,
and travels to the layers as an argument. Nothing of a call stays on a module: threads, copies and recomputation under
checkpointing each see their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

ARGUMENT = "behind_picture"
"""Argument of the language model's layers: bool [batch, tokens], where LoRA acts; absent or None: nowhere."""

_behind: ContextVar[Tensor | None] = ContextVar("behind_picture", default=None)


class PictureLinear(nn.Linear):
    """A linear layer with a low-rank addition for tokens behind a picture.

    Attributes:
        lora_a: [rank, in_features].
        lora_b: [out_features, rank]; zero at first.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to [batch, tokens, in_features]."""
        plain = super().forward(input)
        behind = _behind.get()
        if behind is None:
            return plain
        if behind.shape != input.shape[:-1]:
            raise ValueError(
                f"{ARGUMENT} has shape {list(behind.shape)}, the layer's input {list(input.shape)}; wanted one value "
                "for each token"
            )
        low = functional.linear(functional.linear(input, self.lora_a), self.lora_b)
        return torch.where(behind[..., None], plain + low, plain)


def add_lora(language_model: Any, targets: tuple[str, ...], rank: int) -> None:
    """Give the named projections of each layer of a Llama-like model a LoRA, and let `ARGUMENT` reach them."""
    for layer in language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in targets:
                if isinstance(linear := getattr(block, name, None), nn.Linear):
                    setattr(block, name, PictureLinear(linear, rank))
        # Inside the layer, since gradient checkpointing computes a layer's body again without the layer's own hooks.
        layer.self_attn.register_forward_pre_hook(_enter, with_kwargs=True)
        layer.mlp.register_forward_hook(_leave, always_call=True)


def watch_pictures(llava_model: nn.Module) -> None:
    """Let a `LlavaModel` work out which tokens lie behind a picture, and keep that in the cache between calls."""
    llava_model.register_forward_pre_hook(_mark, with_kwargs=True)
    llava_model.register_forward_hook(_remember, with_kwargs=True)


def _enter(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(kwargs)  # attention functions do not know the argument
    _behind.set(kwargs.pop(ARGUMENT, None))
    return args, kwargs


def _leave(mlp: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _behind.set(None)


def _mark(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if ARGUMENT in kwargs:
        return None
    named = {**dict(zip(("input_ids", "pixel_values"), args, strict=False)), **kwargs}
    tokens, embeddings = named.get("input_ids"), named.get("inputs_embeds")
    before = getattr(_cache_of(named.get), ARGUMENT, None)
    pictures = named.get("pixel_values") is not None or (named.get("mm_encoder_outputs") or {}).get("image") is not None
    if not pictures and before is None:
        return None
    if tokens is not None:
        shape, here = tokens.shape, tokens == model.config.image_token_id
    else:
        embeddings = cast(Tensor, embeddings)  # one of the two is there, or the model itself complains
        shape = embeddings.shape[:-1]
        marker = model.get_input_embeddings().weight[model.config.image_token_id]
        here = (embeddings == marker).all(-1)
    behind = here.cumsum(-1) > 0 if pictures else torch.zeros_like(here)
    if before is not None:
        if before.shape[0] != shape[0]:
            raise ValueError(f"the cache holds {before.shape[0]} sequences, the call has {shape[0]}")
        behind = behind | before[:, None].to(behind.device)
    return args, {**kwargs, ARGUMENT: behind}


def _remember(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """The cache belongs to one generation, so it is the place to note which of its sequences have seen a picture."""
    behind, cache = kwargs.get(ARGUMENT), _cache_of(lambda name: getattr(output, name, None))
    if behind is not None and cache is not None:
        setattr(cache, ARGUMENT, behind[:, -1].clone())


def _cache_of(get: Callable[[str], Any]) -> Any:
    """The cache among arguments or results, None without one: "cache" from transformers 5.24 on."""
    cache = get("cache")
    return get("past_key_values") if cache is None else cache
