"""int4_linear and int8_static_linear in compiled code: one call from float activations to float outputs."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.int4_linear.args import Args
from eff_kernels.ops.int8_linear.common import overflow

_ARGS = struct.Struct("PqqqqqPqPPPqPqq")  # the fields of args in int4_linear.c
_kernel = native.loader("eff_int4_linear", _ARGS)


def reject(*args: *Args) -> str | None:
    """Why the compiled code cannot run this call."""
    x, weight, *_, out_dtype = args
    largest = 128 * (8 if weight.dtype is torch.uint8 else 128)
    return native.unfit(x, out_dtype) or overflow(x.size(1), largest)


def linear(*args: *Args) -> Tensor:
    """As the reference."""
    x, weight, scale, bias, input_scale, out_dtype = args
    step, unit = x.stride()
    if unit != 1:
        x = x.contiguous()
        step = x.size(1)
    weight, scale = weight.contiguous(), scale.contiguous()
    bias_at = bias_code = input_scale_at = 0
    if bias is not None:
        if bias.dtype not in DTYPE_CODES or not bias.is_contiguous():
            bias = bias.float().contiguous()
        bias_at, bias_code = bias.data_ptr(), DTYPE_CODES[bias.dtype]
    if input_scale is not None:
        input_scale = input_scale.contiguous()
        input_scale_at = input_scale.data_ptr()
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n) if out_dtype is x.dtype else torch.empty(m, n, dtype=out_dtype)
    failed = _kernel()(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], m, n, k, step, weight.data_ptr(), weight.dtype is torch.uint8,
        scale.data_ptr(), input_scale_at, bias_at, bias_code, y.data_ptr(), DTYPE_CODES[out_dtype],
        native.threads_for(m * n * k),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"int4_linear could not allocate scratch memory for x {list(x.shape)} and weight {[n, k]}")
    return y
