"""Row-wise and column-wise int8 quantisation in compiled code."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from eff_kernels import native

_ARGS = struct.Struct("PqqqqdPPPq")  # the fields of args in int8_rows.c and int8_columns.c


def reject(x: Tensor, threshold: float) -> str | None:
    """Why the compiled code cannot run this call."""
    if not x.is_cpu:
        return f"needs a CPU tensor, got one on {x.device}"
    if x.dtype not in native.DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return native.unavailable()


def quantize_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, in one pass over x."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    codes = torch.empty(rows, k, dtype=torch.int8)
    absmax = torch.empty(rows)
    columns = torch.zeros(k, dtype=torch.bool)
    failed = _rows_kernel()(_ARGS.pack(
        x.data_ptr(), native.DTYPE_CODES[x.dtype], rows, k, x.stride(0), threshold,
        codes.data_ptr(), absmax.data_ptr(), columns.data_ptr(), native.threads_for(x.numel()),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"int8_quantize_rows could not allocate scratch memory for rows of {k}")
    return codes, absmax, columns


def quantize_columns(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, in two passes over x."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    codes = torch.empty(rows, k, dtype=torch.int8)
    absmax = torch.empty(k)
    columns = torch.empty(k, dtype=torch.bool)
    _columns_kernel()(_ARGS.pack(
        x.data_ptr(), native.DTYPE_CODES[x.dtype], rows, k, x.stride(0), threshold,
        codes.data_ptr(), absmax.data_ptr(), columns.data_ptr(), native.threads_for(x.numel()),
    ))  # fmt: skip
    return codes, absmax, columns


@functools.cache
def _rows_kernel() -> Callable[[bytes], int]:
    return native.fallible("eff_int8_quantize_rows", _ARGS)


@functools.cache
def _columns_kernel() -> Callable[[bytes], None]:
    return native.struct_kernel("eff_int8_quantize_columns", _ARGS)
