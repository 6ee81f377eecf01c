"""row_write: new keys and values go to their rows of a cache."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.ops.common import check_devices

_ARGS = struct.Struct("PqqPPqqqq")  # the fields of args in row_write.c
_kernel = native.loader("eff_row_write", _ARGS)


def row_write(table: Tensor, at: Tensor, values: Tensor) -> None:
    """Overwrite rows of a table: table[at[i * inner + j]] = values[i, j].

    What ``table.index_copy_`` does, without a copy of values whose rows lie apart. In place, without a gradient.

    Args:
        table: [rows, D], contiguous.
        at: int64 [outer * inner], contiguous.
        values: [outer, inner, D] of the table's dtype.

    Raises:
        ValueError: shapes do not fit, or tensors lie on several devices.
        TypeError: ``at`` is not int64, or the dtypes differ.
        IndexError: a row lies outside of the table; nothing is written then.
    """
    if table.dim() != 2 or values.dim() != 3 or values.size(2) != table.size(1) or not table.is_contiguous():
        raise ValueError(
            f"table [rows, D], contiguous, and values [outer, inner, D] do not fit: {list(table.shape)} and "
            f"{list(values.shape)}"
        )
    check_devices("row_write", table=table, at=at, values=values)
    outer, inner, d = values.shape
    if at.shape != (outer * inner,):
        raise ValueError(f"at must have shape {[outer * inner]}, got {list(at.shape)}")
    if at.dtype is not torch.int64 or table.dtype is not values.dtype:
        raise TypeError(
            f"at must be int64 and values of the table's dtype; got {at.dtype}, {table.dtype}, {values.dtype}"
        )
    if not table.is_cpu or native.unavailable():
        table.index_copy_(0, at, values.reshape(-1, d))
        return
    if values.stride(2) != 1:
        values = values.contiguous()
    size = table.element_size()
    far, near, _ = values.stride()
    failed = _kernel()(_ARGS.pack(
        table.data_ptr(), table.size(0), d * size, at.contiguous().data_ptr(), values.data_ptr(), outer, inner,
        far * size, near * size,
    ))  # fmt: skip
    if failed:
        raise IndexError(f"at must lie from 0 to {table.size(0) - 1}, got {int(at.min())} to {int(at.max())}")
