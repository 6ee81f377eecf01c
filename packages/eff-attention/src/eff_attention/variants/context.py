"""What the mixers of a model share in one forward pass: embeddings, padding, positions, static maps.

A hook on the decoder makes a `VariantContext` and hands it to all layers as a keyword argument. The sequence behind
static maps runs through the same decoder as a batch of one: with gradients while training, else once, after which
queries and keys of each layer are kept until a weight changes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eff_attention.caches import cache_kwargs

STREAM = "variant_stream"
"""Name of the decoder's buffer: the random sequence [L, d] or the fixed ids [L]."""
_MAPS = "_variant_maps"

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
        record: Filled by layers with static maps, when the sequence behind them runs.
        weights: If not None, filled by each layer with its map, [B, H, T, S].
    """

    embeddings: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, QK] = field(default_factory=dict)
    key_mask: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    past: int = 0
    record: dict[int, QK] | None = None
    weights: dict[int, Tensor] | None = None


def precompute_maps(model: nn.Module) -> dict[int, QK]:
    """Queries and keys [1, H, L, D] behind the static map of each layer (counted from 0), for L = max_len.

    They are kept on the decoder, and computed again by the next call after a weight has changed. Inference does this by
    itself.

    Raises:
        ValueError: no layer of the model has a static map.
    """
    decoder = decoder_of(model)
    if not hasattr(decoder, STREAM):
        raise ValueError("no layer of the model has a static map; kinds 'rnd_emb_qk' and 'fixed_seq_qk' have")
    version = [(t.data_ptr(), t._version, t.dtype) for t in (*decoder.parameters(), getattr(decoder, STREAM))]
    kept = decoder.__dict__.get(_MAPS)
    if kept is None or kept[0] != version:
        with torch.no_grad():
            kept = version, stream_maps(decoder, getattr(decoder, STREAM).size(0))
        decoder.__dict__[_MAPS] = kept
    maps: dict[int, QK] = kept[1]
    return maps


def stream_maps(decoder: nn.Module, length: int) -> dict[int, QK]:
    """Run the first ``length`` tokens of the sequence behind static maps through the decoder."""
    stream = getattr(decoder, STREAM)[:length]
    embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    embeddings = (embedding(stream) if stream.dtype == torch.int64 else stream.to(embedding.weight.dtype)).unsqueeze(0)
    record: dict[int, QK] = {}
    decoder(inputs_embeds=embeddings, use_cache=False, variant_context=VariantContext(record=record))
    return record


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
    given = [kwargs.pop(name, None) for name in ("past_key_values", "cache")]
    cache = next((c for c in given if c is not None), None)
    use_cache = kwargs.get("use_cache")
    if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
        from transformers import DynamicCache

        cache, kwargs["use_cache"] = DynamicCache(config=decoder.config), True
    if cache is not None:
        from eff_attention.variants.cache_layer import prepare

        prepare(cache, len(decoder.layers), list(mixers))
        context.past = cache.get_seq_length()
    _place(context, kwargs.get("attention_mask"), kwargs.get("position_ids"), context.past, embeddings.size(1))
    for i, mixer in mixers.items():
        if mixer.settings.kind == "static_emb_qk":
            e = embeddings.detach() if mixer.settings.detach_embeddings else embeddings
            context.embeddings[i] = decoder.layers[i].input_layernorm(e)
    if context.record is None and hasattr(decoder, STREAM):
        context.maps = _maps(decoder, context.past + embeddings.size(1))
    changed = {"inputs_embeds": embeddings, "variant_context": context, **cache_kwargs(decoder, cache)}
    return (), {**{k: v for k, v in kwargs.items() if k != "input_ids"}, **changed}


def _maps(decoder: Any, length: int) -> dict[int, QK]:
    longest = getattr(decoder, STREAM).size(0)
    if length > longest:
        raise ValueError(f"the static maps are for inputs of up to max_len={longest} tokens, got {length}")
    if torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()):
        return stream_maps(decoder, length)
    return precompute_maps(decoder)


def _place(context: VariantContext, mask: Any, positions: Tensor | None, past: int, length: int) -> None:
    """Fill in mask and positions."""
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            kind = f"{mask.dim()}-dimensional one" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention variants take an attention_mask [batch, tokens], got a {kind}")
        context.key_mask = mask.bool()
        context.key_positions = (context.key_mask.cumsum(-1) - 1).clamp(min=0)
        context.query_positions = context.key_positions[:, -length:]
    elif positions is not None and not torch.compiler.is_compiling() and (positions.diff(dim=-1) != 1).any():
        raise ValueError("position_ids do not count up by one: attention variants take no packed sequences")
