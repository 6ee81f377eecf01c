"""Row-wise rounding to FP8 in compiled code."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.ops.fp8_quantize.args import Args
from eff_kernels.ops.fp8_quantize.common import FORMATS

_ARGS = struct.Struct("PqqqqqqPPPq")  # the fields of args in fp8_rows.c
_kernel = native.loader("eff_fp8_quantize", _ARGS)


def reject(x: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x)


def quantize(*args: *Args) -> tuple[Tensor, Tensor]:
    """As the reference."""
    x, dtype, power_of_two = args
    rows, k = x.shape
    codes = torch.empty(rows, k, dtype=torch.uint8)
    scale = torch.empty(rows)
    _run(x, dtype, power_of_two, codes.data_ptr(), 0, scale.data_ptr())
    return codes, scale


def round_rows(*args: *Args) -> Tensor:
    """As the reference."""
    x, dtype, power_of_two = args
    values = torch.empty(x.shape, dtype=x.dtype)
    _run(x, dtype, power_of_two, 0, values.data_ptr(), 0)
    return values


def _run(x: Tensor, dtype: torch.dtype, power_of_two: bool, codes: int, values: int, scale: int) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    failed = _kernel()(_ARGS.pack(
        x.data_ptr(), native.DTYPE_CODES[x.dtype], rows, k, x.stride(0), FORMATS[dtype], power_of_two, codes, values,
        scale, native.threads_for(x.numel()),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"fp8_quantize could not allocate scratch memory for rows of {k}")
