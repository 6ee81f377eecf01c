"""Outputs of heads without pictures, kept by the text that they were measured on.

One question is often asked about many pictures, and its text alone decides what a model does without them.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class References:
    """The last texts with their outputs [B, H, d] by layer. Threads may share it; copies and pickles begin empty.

    Args:
        size: Texts that are kept.

    Raises:
        ValueError: ``size`` is negative.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"remember={size}; use 0 for nothing, or a number of texts")
        self.size = size
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, dict[int, Tensor]] = OrderedDict()

    def key(self, decoder: nn.Module, given: Mapping[str, Any]) -> bytes | None:
        """What tells a pass from others: arguments and weights; None where that cannot be told, or nothing is kept."""
        if not self.size or decoder.training:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for weight in (*decoder.parameters(), *decoder.buffers()):
            # Weights that were made in inference mode count no changes, and can only be changed there.
            version = 0 if weight.is_inference() else weight._version
            digest.update(f"{weight.data_ptr()} {version} {weight.dtype} ".encode())
        return digest.digest() if _take(digest, given) else None

    def get(self, key: bytes | None) -> dict[int, Tensor] | None:
        """The outputs of a text, if they are known."""
        with self._lock:
            if key is None or key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key]

    def put(self, key: bytes | None, outputs: Mapping[int, Tensor]) -> None:
        """Keep the outputs of a text, in place of the one that was asked for the longest time ago."""
        if key is None:
            return
        copies = {layer: out.clone() for layer, out in outputs.items()}  # not the whole pass that they are views of
        with self._lock:
            self._held[key] = copies
            while len(self._held) > self.size:
                self._held.popitem(last=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return References, (self.size,)


def _take(digest: Any, value: Any) -> bool:
    """Add an argument to a digest; whether it is of a kind whose contents can be told."""
    if isinstance(value, Mapping):
        return all(_take(digest, name) and _take(digest, value[name]) for name in sorted(value))
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)} {value.device} ".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        return True
    digest.update(f"{value!r} ".encode())
    return value is None or isinstance(value, bool | int | float | str)
