"""int8_linear in compiled code: one call from float activations to float outputs."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.int8_linear.args import Args
from eff_kernels.ops.int8_linear.common import LARGEST_PRODUCT, overflow
from eff_kernels.ops.linear.cpu import product

_ARGS = struct.Struct("PqqqqqPPPqdqqPqq")  # the fields of args in int8_linear.h
_kernel = native.loader("eff_int8_linear", _ARGS)


def reject(*args: *Args) -> str | None:
    """Why the compiled code cannot run this call."""
    x, *_, activation, activation_group, out_dtype = args
    if reason := native.unfit(x, out_dtype):
        return reason
    if activation == "dynamic" and (reason := overflow(activation_group or x.size(1), LARGEST_PRODUCT)):
        return f"{reason}; use activation_group"
    return native.unavailable()


def int8_linear(*args: *Args) -> Tensor:
    """As the reference."""
    x, weight, absmax, bias, threshold, per_token_outliers, activation, activation_group, out_dtype = args
    if activation == "none":
        return product(x, weight, absmax.float() / 127, bias, out_dtype)
    step, unit = x.stride()
    if unit != 1:
        x = x.contiguous()
        step = x.size(1)
    weight, absmax = weight.contiguous(), absmax.contiguous()
    bias_at = bias_code = 0
    if bias is not None:
        if bias.dtype not in DTYPE_CODES or not bias.is_contiguous():
            bias = bias.float().contiguous()
        bias_at, bias_code = bias.data_ptr(), DTYPE_CODES[bias.dtype]
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n) if out_dtype is x.dtype else torch.empty(m, n, dtype=out_dtype)
    failed = _kernel()(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], m, n, k, step, weight.data_ptr(), absmax.data_ptr(), bias_at, bias_code,
        threshold, per_token_outliers, activation_group or 0, y.data_ptr(), DTYPE_CODES[out_dtype],
        native.threads_for(m * n * k),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"int8_linear could not allocate scratch memory for x {list(x.shape)} and weight {[n, k]}")
    return y
