"""Row-wise int8 quantisation in compiled code."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from eff_kernels import native


def reject(x: Tensor, threshold: float) -> str | None:
    """Why the compiled code cannot run this call."""
    if x.device.type != "cpu":
        return f"needs a CPU tensor, got one on {x.device}"
    if x.dtype not in native.DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return native.unavailable()


def quantize_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, in two passes over x."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    codes = torch.empty(rows, k, dtype=torch.int8)
    absmax = torch.empty(rows)
    columns = torch.zeros(k, dtype=torch.bool)
    _kernel()(
        x.data_ptr(), native.DTYPE_CODES[x.dtype], rows, k, x.stride(0), threshold,
        codes.data_ptr(), absmax.data_ptr(), columns.data_ptr(), native.threads_for(x.numel()),
    )  # fmt: skip
    return codes, absmax, columns


@functools.cache
def _kernel() -> Callable[..., None]:
    kernel = native.library().eff_int8_quantize_rows
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    kernel.argtypes = [p, i, n, n, n, ctypes.c_float, p, p, p, i]
    kernel.restype = None
    return kernel
