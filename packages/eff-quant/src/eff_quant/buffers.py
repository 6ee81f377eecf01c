"""Keeping the codes and scales of a layer out of casts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


def dtype_after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a move or cast of a module, as ``_apply`` gets it, makes of the dtype of its float weights.

    Raises:
        TypeError: it would cast codes.
    """
    if fn(torch.empty(0, dtype=torch.uint8, device=device)).dtype != torch.uint8:
        raise TypeError("codes cannot be cast to another dtype; use dequantize_(model) for float weights")
    return fn(torch.empty(0, dtype=dtype, device=device)).dtype
