"""What the launchers of the compiled kernels share: dtype codes, the choice of a thread count, the quickest call."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from eff_kernels.native.build import NativeBuildError, library, unavailable

DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of ``eff_dtype`` in eff.h."""

_PARALLEL_FROM: Final = 65536
"""A parallel region costs about 5 us, the time in which one core handles this many simple elements."""


class _Tape:
    """Where calls of kernels are noted while a thread records them, see `eff_kernels.native.tape`."""

    owner = 0
    notes: list[tuple[int, bytes, bool]] | None = None


tape = _Tape()


def unfit(x: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why compiled code cannot take ``x``, with other tensors or results of these dtypes; None if it can."""
    if not x.is_cpu:
        return f"needs CPU tensors, got one on {x.device}"
    for dtype in (x.dtype, *dtypes):
        if dtype not in DTYPE_CODES:
            return f"takes float32, bfloat16 and float16, got {dtype}"
    return unavailable()


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


def fallible(name: str, fields: struct.Struct) -> Callable[[bytes], int]:
    """A kernel that takes a pointer to one struct and returns 0, or another number when it failed.

    Args:
        name: Name of the exported function.
        fields: The packing of the struct that it reads.

    Raises:
        NativeBuildError: the struct in C is not as long as what is packed.
    """
    kernel = _kernel(name, fields)
    kernel.restype = ctypes.c_int
    run: Callable[[bytes], int] = _noted(kernel, fallible=True)
    return run


def struct_kernel(name: str, fields: struct.Struct) -> Callable[[bytes], None]:
    """The same for a kernel that cannot fail.

    ctypes passes one argument in a third of the time of twelve, which shows in ops on a single short row.
    """
    kernel = _kernel(name, fields)
    kernel.restype = None
    run: Callable[[bytes], None] = _noted(kernel, fallible=False)
    return run


def loader(name: str, fields: struct.Struct, *, may_fail: bool = True) -> Callable[[], Callable[[bytes], int]]:
    """A function that loads a kernel when it is first called, and returns it."""
    return functools.cache(lambda: _load(name, fields, may_fail))


def loader_by_name(fields: struct.Struct, *, may_fail: bool = True) -> Callable[[str], Callable[[bytes], int]]:
    """The same for several kernels that read one struct; it takes the kernel's name."""
    return functools.cache(lambda name: _load(name, fields, may_fail))


def _load(name: str, fields: struct.Struct, may_fail: bool) -> Any:
    return (fallible if may_fail else struct_kernel)(name, fields)


def _noted(kernel: Any, *, fallible: bool) -> Any:
    """The kernel; its calls are noted while this thread records."""
    address = ctypes.cast(kernel, ctypes.c_void_p).value or 0

    def run(packed: bytes) -> Any:
        if tape.notes is not None and tape.owner == threading.get_ident():
            tape.notes.append((address, packed, fallible))
        return kernel(packed)

    found: Any = run
    found.argtypes, found.restype = kernel.argtypes, kernel.restype
    return found


def _kernel(name: str, fields: struct.Struct) -> Any:
    kernel, size = getattr(library(), name), ctypes.c_int64.in_dll(library(), f"{name}_takes").value
    if size != fields.size:
        raise NativeBuildError(f"{name} reads a struct of {size} bytes, its launcher packs {fields.size}")
    kernel.argtypes = [ctypes.c_char_p]
    return kernel
