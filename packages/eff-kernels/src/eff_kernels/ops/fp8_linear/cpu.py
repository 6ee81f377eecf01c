"""fp8_linear in compiled code: weights are decoded in registers or once for many rows, sums are float32."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.fp8_quantize.cpu import FORMATS

_ARGS = struct.Struct("PqqqqqPqqPPPqqq")  # the fields of args in fp8_linear.c


def reject(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activations: str, out_dtype: torch.dtype
) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x, out_dtype) or native.unavailable()


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activations: str, out_dtype: torch.dtype
) -> Tensor:
    """As the reference, summed in float32, each row independent of the others."""
    step, unit = x.stride()
    if unit != 1:
        x = x.contiguous()
        step = x.size(1)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    scale = scale.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n) if out_dtype is x.dtype else torch.empty(m, n, dtype=out_dtype)
    failed = _kernel()(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], m, n, k, step, weight.data_ptr(), FORMATS[weight.dtype], weight.stride(0),
        scale.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), DTYPE_CODES[out_dtype],
        activations == "dynamic", native.threads_for(m * n * k),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"fp8_linear could not allocate scratch memory for x {list(x.shape)}")
    return y


@functools.cache
def _kernel() -> Callable[[bytes], int]:
    return native.fallible("eff_fp8_linear", _ARGS)
