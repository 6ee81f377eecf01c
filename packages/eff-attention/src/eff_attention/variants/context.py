"""What the mixers of a model share in one forward pass: embeddings, padding, positions, static maps.

A hook on the decoder makes a `VariantContext` and hands it to all layers as a keyword argument. The sequence behind
static maps runs through the same layers: without a cache as one more row of the batch, so that checkpointing of either
kind finds all that it needs in the hidden states; with a cache before the prompt, and what came of it is kept there.
Nothing is kept with the model, whose weights, adapters and precision may be others at the next call.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit.caches import cache_kwargs
from torch import Tensor, nn

STREAM = "variant_stream"
"""Name of the decoder's buffer: the random sequence [L, d] or the fixed ids [L]."""
_MAPS = "_variant_maps"  # of a cache
_ROOM = 64  # rows of static maps that are computed for a cache, or twice those that are needed

QK = tuple[Tensor, Tensor]


@dataclass(slots=True)
class VariantContext:
    """See the module.

    Attributes:
        embeddings: For each layer whose map comes from the input's embeddings: these, after the norm of the layer.
        maps: For each layer with a static map: queries and keys [1, H, L, D] of the sequence behind it.
        key_mask: bool [B, S] over past and present tokens, or None.
        query_positions, key_positions: Rows of the static map for the present tokens [B, T] and for all tokens [B, S];
            None where they are simply the last T and all of 0 .. S - 1.
        past: Number of tokens in the cache.
        stream_row: Whether the first row of the batch is the sequence behind static maps.
        record: Filled by layers with static maps, when the sequence behind them runs alone.
        weights: If not None, filled by each layer with its map, [B, H, T, S].
    """

    embeddings: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, QK] = field(default_factory=dict)
    key_mask: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    past: int = 0
    stream_row: bool = False
    record: dict[int, QK] | None = None
    weights: dict[int, Tensor] | None = None


@torch.no_grad()
def precompute_maps(model: nn.Module) -> dict[int, QK]:
    """Queries and keys [1, H, L, D] behind the static map of each layer (counted from 0), for L = max_len.

    Raises:
        ValueError: no layer of the model has a static map.
    """
    decoder = decoder_of(model)
    if not hasattr(decoder, STREAM):
        raise ValueError("no layer of the model has a static map; kinds 'rnd_emb_qk' and 'fixed_seq_qk' have")
    return stream_maps(decoder, getattr(decoder, STREAM).size(0))


def stream_maps(decoder: nn.Module, length: int) -> dict[int, QK]:
    """Run the first ``length`` tokens of the sequence behind static maps through the decoder."""
    record: dict[int, QK] = {}
    context = VariantContext(record=record)
    decoder(inputs_embeds=_stream(decoder, length), use_cache=False, variant_context=context)
    return record


def _stream(decoder: Any, length: int) -> Tensor:
    """Embeddings [1, L, d] of the sequence behind static maps."""
    stream = getattr(decoder, STREAM)
    if length > stream.size(0):
        raise ValueError(f"the static maps are for inputs of up to max_len={stream.size(0)} tokens, got {length}")
    embedding, stream = decoder.get_input_embeddings(), stream[:length]
    embeddings: Tensor = embedding(stream) if stream.dtype == torch.int64 else stream.to(embedding.weight.dtype)
    return embeddings.unsqueeze(0)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module with the embedding and the layers.

    Raises:
        TypeError: the model has none that is laid out as Llama and Qwen are.
    """
    decoder = getattr(model, "model", model)
    if not (hasattr(decoder, "layers") and hasattr(decoder, "embed_tokens") and hasattr(decoder, "rotary_emb")):
        raise TypeError(
            f"wanted a decoder with embed_tokens, layers and rotary_emb, as in Llama, got {type(model).__name__}"
        )
    return decoder


def share(decoder: nn.Module) -> None:
    """Let a decoder hand a context to its layers, once."""
    if share_context not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(share_context, with_kwargs=True)
        decoder.register_forward_hook(drop_stream, with_kwargs=True)


def share_context(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hook: adds ``variant_context`` to the arguments of a decoder's forward."""
    names = list(inspect.signature(type(decoder).forward).parameters)[1:]
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    context = kwargs.get("variant_context") or VariantContext(weights=kwargs.pop("variant_weights", None))
    embeddings = kwargs.get("inputs_embeds")
    if embeddings is None:
        embeddings = decoder.embed_tokens(kwargs.pop("input_ids"))
    mixers = {i: layer.self_attn for i, layer in enumerate(decoder.layers) if hasattr(layer.self_attn, "settings")}
    cache = _cache(decoder, kwargs)
    if cache is not None:
        from eff_attention.variants.cache_layer import prepare

        prepare(cache, len(decoder.layers), list(mixers))
        context.past = cache.get_seq_length()
    _check_mask(kwargs.get("attention_mask"))
    if context.record is None and hasattr(decoder, STREAM):
        length = embeddings.size(1)
        if cache is None:
            context.stream_row = True
            embeddings = torch.cat([_stream(decoder, length).to(embeddings.dtype), embeddings])
            kwargs |= _with_row(kwargs, length)
        else:
            context.maps = _maps(decoder, cache, context.past + length)
    _place(context, kwargs.get("attention_mask"), kwargs.get("position_ids"), embeddings.size(1))
    for i, mixer in mixers.items():
        if mixer.settings.kind == "static_emb_qk":
            e = embeddings.detach() if mixer.settings.detach_embeddings else embeddings
            if e.requires_grad and _reentrant(decoder.layers[i]):
                raise NotImplementedError(
                    "static_emb_qk keeps the gradient of its maps from reentrant checkpointing; use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}, or detach_embeddings=True"
                )
            context.embeddings[i] = decoder.layers[i].input_layernorm(e)
    changed = {"inputs_embeds": embeddings, "variant_context": context, **cache_kwargs(decoder, cache)}
    return (), {**{k: v for k, v in kwargs.items() if k != "input_ids"}, **changed}


def drop_stream(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The other hook: takes the row of the sequence behind static maps out of the results."""
    context: VariantContext = kwargs["variant_context"]
    if not context.stream_row:
        return output
    if context.weights is not None:
        context.weights.update({i: w[1:] for i, w in context.weights.items()})
    if isinstance(output, tuple):
        return tuple(_without_row(v) for v in output)
    for name in list(output):
        output[name] = _without_row(output[name])
    return output


def _without_row(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[1:]
    return tuple(_without_row(v) for v in value) if isinstance(value, tuple) else value


def _with_row(kwargs: dict[str, Any], length: int) -> dict[str, Any]:
    """Mask and positions with those of the sequence behind static maps before them."""
    rows = {}
    for name, first in (("attention_mask", lambda like: torch.ones_like(like[:1])),
                        ("position_ids", lambda like: torch.arange(length, device=like.device)[None])):  # fmt: skip
        value = kwargs.get(name)
        if value is not None and (name == "attention_mask" or value.size(0) > 1):
            rows[name] = torch.cat([first(value).to(value.dtype), value])
    return rows


def _cache(decoder: Any, kwargs: dict[str, Any]) -> Any:
    """The cache, made if one is wanted and none is given; layers that are checkpointed take none."""
    given = [kwargs.pop(name, None) for name in ("past_key_values", "cache")]
    cache = next((c for c in given if c is not None), None)
    use_cache = kwargs.get("use_cache")
    if decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers):
        if cache is not None and cache.get_seq_length():
            raise ValueError("gradient checkpointing in training takes no cache with tokens in it")
        kwargs["use_cache"] = False
        return None
    if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
        from transformers import DynamicCache

        cache, kwargs["use_cache"] = DynamicCache(config=decoder.config), True
    return cache


def _reentrant(layer: Any) -> bool:
    """Whether a layer is checkpointed in a way that loses gradients of what is not in its hidden states."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    return bool(getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True))


def _maps(decoder: Any, cache: Any, length: int) -> dict[int, QK]:
    """Static maps of the tokens so far; kept with the cache, which is as old as the weights that filled it."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()):
        return stream_maps(decoder, length)
    kept: tuple[int, dict[int, QK]] = cache.__dict__.get(_MAPS, (0, {}))
    if kept[0] < length:
        room = max(length, min(getattr(decoder, STREAM).size(0), max(_ROOM, 2 * length)))
        kept = room, stream_maps(decoder, room)
        cache.__dict__[_MAPS] = kept
    return kept[1]


def _check_mask(mask: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        kind = f"{mask.dim()}-dimensional one" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention variants take an attention_mask [batch, tokens], got a {kind}")


def _place(context: VariantContext, mask: Tensor | None, positions: Tensor | None, length: int) -> None:
    """Fill in mask and positions."""
    if mask is not None:
        context.key_mask = mask.bool()
        context.key_positions = (context.key_mask.cumsum(-1) - 1).clamp(min=0)
        context.query_positions = context.key_positions[:, -length:]
    elif positions is not None and not torch.compiler.is_compiling() and (positions.diff(dim=-1) != 1).any():
        raise ValueError("position_ids do not count up by one: attention variants take no packed sequences")
