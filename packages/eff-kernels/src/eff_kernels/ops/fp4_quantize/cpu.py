"""fp4_quantize and fp4_dequantize in compiled code."""

from __future__ import annotations

import struct
from typing import Final

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.fp4_quantize.args import Args, DequantizeArgs
from eff_kernels.ops.fp4_quantize.common import BLOCKS, SCALE_ROUNDINGS

FORMAT_CODES: Final = {"nvfp4": 0, "mxfp4": 1}
"""Codes of fp4.h."""

_ARGS = struct.Struct("PqqqqPqqPPq")  # the fields of args in fp4_quantize.c
_BACK_ARGS = struct.Struct("PPPqqqPqq")  # those of back_args
_quantize = native.loader("eff_fp4_quantize", _ARGS, may_fail=False)
_dequantize = native.loader("eff_fp4_dequantize", _BACK_ARGS, may_fail=False)


def address(tensor: Tensor | None) -> int:
    """Where the tensor's values lie; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def reject(x: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x)


def quantize(*args: *Args) -> tuple[Tensor, Tensor]:
    """As the reference, bit for bit."""
    x, global_scale, format, scale_rounding = args
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    packed = torch.empty(rows, k // 2, dtype=torch.uint8)
    scale = torch.empty(rows, k // BLOCKS[format], dtype=torch.uint8)
    _quantize()(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], rows, k, x.stride(0), address(global_scale), FORMAT_CODES[format],
        SCALE_ROUNDINGS.index(scale_rounding), packed.data_ptr(), scale.data_ptr(), native.threads_for(x.numel()),
    ))  # fmt: skip
    return packed, scale


def reject_dequantize(*args: *DequantizeArgs) -> str | None:
    """Why the compiled code cannot run this call."""
    packed, *_, dtype = args
    if not packed.is_cpu:
        return f"needs CPU tensors, got packed on {packed.device}"
    if dtype not in DTYPE_CODES:
        return f"gives float32, bfloat16 and float16, got {dtype}"
    return native.unavailable()


def dequantize(*args: *DequantizeArgs) -> Tensor:
    """As the reference, bit for bit."""
    packed, scale, global_scale, format, dtype = args
    packed, scale = packed.contiguous(), scale.contiguous()
    rows, k = packed.size(0), 2 * packed.size(1)
    out = torch.empty(rows, k, dtype=dtype)
    _dequantize()(_BACK_ARGS.pack(
        packed.data_ptr(), scale.data_ptr(), address(global_scale), FORMAT_CODES[format], rows, k, out.data_ptr(),
        DTYPE_CODES[dtype], native.threads_for(out.numel()),
    ))  # fmt: skip
    return out
