"""fp4_linear in compiled code: weights stay packed, and no sum depends on the number of rows."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.fp4_linear.args import Args
from eff_kernels.ops.fp4_quantize import cpu as fp4_cpu
from eff_kernels.ops.fp4_quantize.common import global_scale_of
from eff_kernels.ops.fp4_quantize.cpu import FORMAT_CODES, address

_ARGS = struct.Struct("PqqqqqPPPPPPqqq")  # the fields of args in fp4_linear.c
_kernel = native.loader("eff_fp4_linear", _ARGS)


def reject(*args: *Args) -> str | None:
    """Why the compiled code cannot run this call."""
    x, *_, out_dtype = args
    return native.unfit(x, out_dtype)


def fp4_linear(*args: *Args) -> Tensor:
    """As the reference, summed in float32."""
    x, packed, scale, global_scale, bias, input_global_scale, format, activations, scale_rounding, out_dtype = args
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
