"""Row-wise and column-wise int8 quantisation in compiled code."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.ops.int8_quantize.args import Args

_ARGS = struct.Struct("PqqqqdPPPq")  # the fields of args in int8_rows.c and int8_columns.c
_rows_kernel = native.loader("eff_int8_quantize_rows", _ARGS)
_columns_kernel = native.loader("eff_int8_quantize_columns", _ARGS, may_fail=False)


def reject(x: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x)


def quantize_rows(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, in one pass over x."""
    x, threshold = args
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


def quantize_columns(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, in two passes over x."""
    x, threshold = args
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
