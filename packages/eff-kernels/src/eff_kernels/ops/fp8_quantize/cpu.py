"""Row-wise rounding to FP8 in compiled code."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from eff_kernels import native

FORMATS: Final = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
"""Codes of ``eff_fp8`` in fp8.h."""

_ARGS = struct.Struct("PqqqqqqPPPq")  # the fields of args in fp8_rows.c


def reject(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> str | None:
    """Why the compiled code cannot run this call."""
    if not x.is_cpu:
        return f"needs a CPU tensor, got one on {x.device}"
    if x.dtype not in native.DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return native.unavailable()


def quantize(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """As the reference."""
    rows, k = x.shape
    codes = torch.empty(rows, k, dtype=torch.uint8)
    scale = torch.empty(rows)
    _run(x, dtype, power_of_two, codes.data_ptr(), 0, scale.data_ptr())
    return codes, scale


def round_rows(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """As the reference."""
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


@functools.cache
def _kernel() -> Callable[[bytes], int]:
    return native.fallible("eff_fp8_quantize", _ARGS)
