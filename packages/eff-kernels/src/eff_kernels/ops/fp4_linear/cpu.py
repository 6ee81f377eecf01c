"""fp4_linear in compiled code: weights stay packed, and no sum depends on the number of rows."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.fp4_quantize import cpu as fp4_cpu
from eff_kernels.ops.fp4_quantize.cpu import FORMAT_CODES, address
from eff_kernels.ops.fp4_quantize.reference import global_scale_of

_ARGS = struct.Struct("PqqqqqPPPPPPqqq")  # the fields of args in fp4_linear.c


def reject(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    input_global_scale: Tensor | None,
    format: str,
    activations: str,
    scale_rounding: str,
    out_dtype: torch.dtype,
) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x, out_dtype) or native.unavailable()


def fp4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    input_global_scale: Tensor | None,
    format: str,
    activations: str,
    scale_rounding: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """As the reference, summed in float32."""
    if activations == "dynamic":
        if format == "nvfp4" and input_global_scale is None:
            input_global_scale = global_scale_of(x)
        codes, block_scale = fp4_cpu.quantize(x, input_global_scale, format, scale_rounding)
        # Code times block scale has few enough bits for bfloat16; s_g is left for the sums.
        one = None if format == "mxfp4" else torch.ones(())
        x = fp4_cpu.dequantize(codes, block_scale, one, format, torch.bfloat16)
    if x.stride(1) != 1:
        x = x.contiguous()
    packed, scale = packed.contiguous(), scale.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    (m, k), n = x.shape, packed.shape[0]
    y = x.new_empty(m, n, dtype=out_dtype)
    failed = _kernel()(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], m, n, k, x.stride(0), packed.data_ptr(), scale.data_ptr(),
        address(global_scale), address(input_global_scale), address(bias), y.data_ptr(), DTYPE_CODES[out_dtype],
        FORMAT_CODES[format], native.threads_for(m * n * k),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"fp4_linear could not allocate scratch memory for x {list(x.shape)}")
    return y


@functools.cache
def _kernel() -> Callable[[bytes], int]:
    return native.fallible("eff_fp4_linear", _ARGS)
