"""A cache of transformers that appends in place: decoding then copies one token, not the whole context."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig


def growing_cache(config: PretrainedConfig) -> DynamicCache:
    """A `DynamicCache` whose layers of full attention keep room to grow.

    transformers' own copies all keys and values at each step, which at thousands of tokens takes longer than
    attention to them. Pass it as ``past_key_values`` (``cache`` from transformers 5.24 on) to ``generate`` or a forward
    pass; it holds the same values, with an eighth more memory (at least 256 tokens). Keys and values are views into it:
    what `crop` drops is written over by what comes next.

    Args:
        config: Of the model. Layers of other kinds (sliding windows, linear attention) stay transformers' own.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from eff_attention.layer_reuse.growing_layer import GrowingLayer

    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
