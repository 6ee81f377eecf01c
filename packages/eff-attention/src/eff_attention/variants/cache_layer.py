"""What a mixer keeps of the past, in a transformers `Cache`. Import it in functions: it loads transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class VariantCacheLayer(CacheLayerMixin):
    """A state of fixed size, or values that grow, or nothing but the number of tokens.

    Attributes:
        state: Of a recurrent mixer, [B, ...].
        values: Of a mixer with a map, [B, Hkv, S, D].
        keys: The same, of a mixer whose map follows from the tokens; a static map needs none.
        seen: Number of tokens so far.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for this layer: its mixer calls `append` or sets ``state``."""
        raise NotImplementedError("this layer of the cache keeps no keys; it belongs to an attention variant")

    def append(self, values: Tensor) -> Tensor:
        """All values so far, the new ones last."""
        self.values = values if self.values is None else torch.cat([self.values, values], -2)
        return self.values

    def append_keys(self, keys: Tensor) -> Tensor:
        """All keys so far, the new ones last."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], -2)
        return self.keys

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: none."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.keys, self.values, self.seen = None, None, None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number), which a state cannot."""
        if tokens_to_remove == 0:
            return
        if self.state is not None:
            raise RuntimeError("a recurrent state cannot forget its last tokens; crop is not possible")
        left = self.seen - abs(tokens_to_remove)
        self.keys = None if self.keys is None else self.keys[..., :left, :]
        self.values = None if self.values is None else self.values[..., :left, :]
        self.seen -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, for beam search."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch several times."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch."""
        self._each(lambda t: t[indices])

    def offload(self) -> None:
        """A state is small: it stays."""

    def prefetch(self) -> None:
        """A state is small: it stayed."""

    def _each(self, change: Any) -> None:
        self.state = None if self.state is None else change(self.state)
        self.keys = None if self.keys is None else change(self.keys)
        self.values = None if self.values is None else change(self.values)


def prepare(cache: Any, depth: int, layers: list[int]) -> None:
    """Give the layers (counted from 0) of a cache that is still empty there a `VariantCacheLayer` each."""
    while len(cache.layers) < depth:
        cache.layers.append(DynamicLayer())
    for i in layers:
        layer = cache.layers[i]
        if isinstance(layer, VariantCacheLayer):
            continue
        if type(layer) is not DynamicLayer or layer.is_initialized:
            raise ValueError(
                f"layer {i} is an attention variant and needs an empty layer of a DynamicCache, "
                f"got a {type(layer).__name__}{' in use' if layer.is_initialized else ''}"
            )
        cache.layers[i] = VariantCacheLayer()
