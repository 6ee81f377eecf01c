"""Keeping the codes and scales of a layer out of casts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

_INTEGERS = {torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8, torch.float32: torch.int32}


@contextmanager
def as_integers(layer: nn.Module, names: Sequence[str] | None = None) -> Iterator[None]:
    """Show float buffers as integers of their width, which casts such as .half() and .to(torch.bfloat16) leave alone.

    Args:
        layer: Its buffers of float8 and float32 are viewed for the length of the block.
        names: Only these; all by default.
    """
    before = {n: t for n, t in layer._buffers.items() if t is not None and (names is None or n in names)}
    for name, tensor in before.items():
        layer._buffers[name] = tensor.view(_INTEGERS.get(tensor.dtype, tensor.dtype))
    try:
        yield
    finally:
        for name, tensor in before.items():
            moved = layer._buffers[name]
            layer._buffers[name] = tensor if moved is None else moved.view(tensor.dtype)
