"""fp8_linear in compiled code: weights are decoded in registers or once for many rows, sums are float32."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.fp8_linear.args import Args
from eff_kernels.ops.fp8_quantize.common import FORMATS

_ARGS = struct.Struct("PqqqqqPqqPPPqqq")  # the fields of args in fp8_linear.c
_kernel = native.loader("eff_fp8_linear", _ARGS)


def reject(*args: *Args) -> str | None:
    """Why the compiled code cannot run this call."""
    x, *_, out_dtype = args
    return native.unfit(x, out_dtype)


def fp8_linear(*args: *Args) -> Tensor:
    """As the reference, summed in float32, each row independent of the others."""
    x, weight, scale, bias, activations, out_dtype = args
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
