"""fp4_quantize and fp4_dequantize in compiled code."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.fp4_quantize.reference import BLOCKS, SCALE_ROUNDINGS

FORMAT_CODES: Final = {"nvfp4": 0, "mxfp4": 1}
"""Codes of fp4.h."""

_ARGS = struct.Struct("PqqqqPqqPPq")  # the fields of args in fp4_quantize.c
_BACK_ARGS = struct.Struct("PPPqqqPqq")  # those of back_args


def address(tensor: Tensor | None) -> int:
    """Where the tensor's values lie; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def reject(x: Tensor, global_scale: Tensor | None, format: str, scale_rounding: str) -> str | None:
    """Why the compiled code cannot run this call."""
    if not x.is_cpu:
        return f"needs a CPU tensor, got one on {x.device}"
    if x.dtype not in DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return native.unavailable()


def quantize(x: Tensor, global_scale: Tensor | None, format: str, scale_rounding: str) -> tuple[Tensor, Tensor]:
    """As the reference, bit for bit."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, k = x.shape
    packed = torch.empty(rows, k // 2, dtype=torch.uint8)
    scale = torch.empty(rows, k // BLOCKS[format], dtype=torch.uint8)
    _kernel("eff_fp4_quantize")(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], rows, k, x.stride(0), address(global_scale), FORMAT_CODES[format],
        SCALE_ROUNDINGS.index(scale_rounding), packed.data_ptr(), scale.data_ptr(), native.threads_for(x.numel()),
    ))  # fmt: skip
    return packed, scale


def reject_dequantize(
    packed: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype
) -> str | None:
    """Why the compiled code cannot run this call."""
    if not packed.is_cpu:
        return f"needs CPU tensors, got packed on {packed.device}"
    if dtype not in DTYPE_CODES:
        return f"gives float32, bfloat16 and float16, got {dtype}"
    return native.unavailable()


def dequantize(packed: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """As the reference, bit for bit."""
    packed, scale = packed.contiguous(), scale.contiguous()
    rows, k = packed.size(0), 2 * packed.size(1)
    out = torch.empty(rows, k, dtype=dtype)
    _kernel("eff_fp4_dequantize")(_BACK_ARGS.pack(
        packed.data_ptr(), scale.data_ptr(), address(global_scale), FORMAT_CODES[format], rows, k, out.data_ptr(),
        DTYPE_CODES[dtype], native.threads_for(out.numel()),
    ))  # fmt: skip
    return out


@functools.cache
def _kernel(name: str) -> Callable[[bytes], None]:
    return native.struct_kernel(name, _ARGS if name == "eff_fp4_quantize" else _BACK_ARGS)
