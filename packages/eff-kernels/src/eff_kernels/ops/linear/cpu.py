"""linear in compiled code: 16-bit weights are widened in registers, and no sum depends on the number of rows."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.linear.args import Args

_ARGS = struct.Struct("PqqqqqPqqPPPqq")  # the fields of args in linear.c
_kernel = native.loader("eff_linear", _ARGS)
_WEIGHT_CODES = {**DTYPE_CODES, torch.int8: 3}


def reject(x: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x, weight.dtype)


def linear(*args: *Args) -> Tensor:
    """As the reference, summed in float32."""
    x, weight, bias = args
    return product(x, weight, None, bias, x.dtype)


def product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """(x [M, K] @ weight [N, K]^T) * scale [N] + bias [N], for a float weight, or int8 codes."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    m, k = x.shape
    n = weight.shape[0]
    y = x.new_empty(m, n, dtype=out_dtype)
    failed = _kernel()(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], m, n, k, x.stride(0), weight.data_ptr(), _WEIGHT_CODES[weight.dtype],
        weight.stride(0), 0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), DTYPE_CODES[out_dtype], native.threads_for(m * n * k),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"linear could not allocate scratch memory for x {list(x.shape)}")
    return y
