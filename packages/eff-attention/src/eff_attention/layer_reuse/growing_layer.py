"""The layer of a growing cache. Import it in functions: it loads transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """One layer: ``keys`` and ``values`` are the beginning of a buffer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, in place if there is room."""
        if key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        if keys is None or values is None or keys.numel() == 0:  # of one dimension until the first update
            keys, values = key_states[:, :, :0], value_states[:, :, :0]
        start, end = keys.size(2), keys.size(2) + key_states.size(2)
        held = self.buffers
        if held is None or not (_begins(held[0], keys, end) and _begins(held[1], values, end)):
            self.buffers = held = _room(keys, key_states), _room(values, value_states)
        for buffer, states in zip(held, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = held[0][:, :, :end], held[1][:, :, :end]
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything, the length too, which early releases of transformers 5 keep."""
        self.buffers = self.keys = self.values = None
        self.is_initialized = False
        super().reset()


def _begins(buffer: Tensor, held: Tensor, end: int) -> bool:
    """Whether ``held`` is the beginning of the buffer still (nobody reordered the batch), with room up to ``end``."""
    same = buffer.data_ptr() == held.data_ptr() and buffer.stride() == held.stride()
    return same and buffer.shape[:2] == held.shape[:2] and buffer.shape[3:] == held.shape[3:] and end <= buffer.size(2)


def _room(old: Tensor, new: Tensor) -> Tensor:
    """A buffer that begins with ``old`` and has room for ``new`` and some more."""
    end = old.size(2) + new.size(2)
    buffer = new.new_empty(*new.shape[:2], end + max(256, end // 8), new.size(3))
    buffer[:, :, : old.size(2)] = old
    return buffer
