"""rms_norm in compiled code.

A decoder calls this some sixty times per token on rows of a few hundred elements, so that the way into C counts: the
arguments travel as one packed struct, which ctypes passes three times faster than twelve arguments.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor, contiguous_format, empty_like

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES, rows_of, threads_for
from eff_kernels.ops.rms_norm.args import AddArgs, Args, BackwardArgs

# The fields of forward_args and backward_args in rms_norm.c.
_FORWARD = struct.Struct("qqPqPqPdPPqqq")
_forward = native.loader("eff_rms_norm", _FORWARD, may_fail=False)
_BACKWARD = struct.Struct("qqPqPqPPqdPPqqqq")
_backward = native.loader("eff_rms_norm_backward", _BACKWARD, may_fail=False)
_PARTS = 64  # at most so many partial sums of the weight's gradient, whatever the number of threads


def reject(x: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x, weight.dtype)


def reject_add(x: Tensor, residual: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x, weight.dtype)


def reject_backward(grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x, weight.dtype)


def rms_norm(*args: *Args) -> Tensor:
    """As the reference."""
    x, weight, eps = args
    out = empty_like(x, memory_format=contiguous_format)
    x, stride = rows_of(x)
    if not weight.is_contiguous():
        weight = weight.contiguous()
    d, numel = weight.shape[0], out.numel()
    _forward()(_FORWARD.pack(
        numel // d if d else 0, d, x.data_ptr(), stride, 0, 0, weight.data_ptr(), eps, 0, out.data_ptr(),
        DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], threads_for(numel),
    ))  # fmt: skip
    return out


def add_rms_norm(*args: *AddArgs) -> tuple[Tensor, Tensor]:
    """As the reference."""
    x, residual, weight, eps = args
    out = empty_like(x, memory_format=contiguous_format)
    total = empty_like(x, memory_format=contiguous_format)
    x, stride = rows_of(x)
    residual, residual_stride = rows_of(residual)
    if not weight.is_contiguous():
        weight = weight.contiguous()
    d, numel = weight.shape[0], out.numel()
    _forward()(_FORWARD.pack(
        numel // d if d else 0, d, x.data_ptr(), stride, residual.data_ptr(), residual_stride,
        weight.data_ptr(), eps, total.data_ptr(), out.data_ptr(),
        DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], threads_for(numel),
    ))  # fmt: skip
    return out, total


def rms_norm_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    """As the reference. The weight's gradient is summed in parts that depend on the shape alone: it is repeatable."""
    grad, x, weight, eps, grad_residual = args
    grad_x = empty_like(x, memory_format=contiguous_format)
    x, x_stride = rows_of(x)
    grad, grad_stride = rows_of(grad.to(x.dtype))
    more, more_stride = (None, 0) if grad_residual is None else rows_of(grad_residual.to(x.dtype))
    weight = weight.contiguous()
    d = weight.size(0)
    rows = x.numel() // d if d else 0
    rows_per_part = max(-(-rows // _PARTS), 8)
    parts = torch.empty(-(-rows // rows_per_part), d, dtype=torch.float32)
    _backward()(_BACKWARD.pack(
        rows, d, grad.data_ptr(), grad_stride, x.data_ptr(), x_stride, weight.data_ptr(),
        0 if more is None else more.data_ptr(), more_stride, eps, grad_x.data_ptr(), parts.data_ptr(),
        rows_per_part, DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], threads_for(x.numel()),
    ))  # fmt: skip
    return grad_x, parts.sum(0).to(weight.dtype)
