"""What the launchers of the compiled kernels share: dtype codes, the choice of a thread count, the quickest call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from eff_kernels.native.build import library

DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of ``eff_dtype`` in eff.h."""

_PARALLEL_FROM: Final = 65536
"""A parallel region costs about 5 us, the time in which one core handles this many simple elements."""


def threads_for(work: int) -> int:
    """Threads to use for ``work`` elements: 1 for small work, else `torch.get_num_threads`."""
    return 1 if work < _PARALLEL_FROM else torch.get_num_threads()


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Return the tensor, or a copy, whose rows have unit stride and lie one distance apart; and that distance."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.contiguous()
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def fallible(kernel: Any) -> Callable[[bytes], int]:
    """A kernel of the library that takes a pointer to one struct and returns 0, or another number when it failed."""
    kernel.argtypes, kernel.restype = [ctypes.c_char_p], ctypes.c_int
    run: Callable[[bytes], int] = kernel
    return run


def struct_kernel(name: str) -> Callable[[bytes], None]:
    """A kernel that takes a pointer to one struct, called with the bytes of ``struct.pack``.

    ctypes passes one argument in a third of the time of twelve, which shows in ops on a single short row.
    """
    kernel = getattr(library(), name)
    kernel.argtypes, kernel.restype = [ctypes.c_char_p], None
    run: Callable[[bytes], None] = kernel
    return run
