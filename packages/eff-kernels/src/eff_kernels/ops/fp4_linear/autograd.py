"""Gradient of fp4_linear with respect to its input, as an op of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.fp4_linear import reference
from eff_kernels.ops.fp4_linear.args import BackwardArgs
from eff_kernels.ops.fp4_quantize.api import DEQUANTIZE_OP

_BLOCK = 512  # weight rows that are dequantised at a time


def _blocked(*args: *BackwardArgs) -> Tensor:
    grad, packed, scale, global_scale, format, dtype = args
    wide = grad.float()
    out = wide.new_zeros(grad.size(0), 2 * packed.size(1))
    scale = scale.view(torch.uint8)
    for n in range(0, packed.size(0), _BLOCK):
        rows = slice(n, n + _BLOCK)
        out.addmm_(wide[:, rows], DEQUANTIZE_OP(packed[rows], scale[rows], global_scale, format, torch.float32))
    return out.to(dtype)


def _reject_blocked(*args: *BackwardArgs) -> str | None:
    grad, *_, dtype = args
    if grad.device.type != "cpu":
        return f"needs CPU tensors, got the gradient on {grad.device}"
    if grad.dtype == torch.float64 or dtype == torch.float64:
        return "sums in float32, got float64"
    return None


BACKWARD_OP = Op(
    "fp4_linear_backward",
    schema_of(BackwardArgs, "Tensor"),
    [
        Backend("cpu", _blocked, _reject_blocked),
        triton_backend("eff_kernels.ops.fp4_linear.triton", run="backward", reject="reject_backward"),
        Backend("reference", reference.fp4_linear_backward),
    ],
    fake=lambda grad, packed, *options: grad.new_empty((grad.shape[0], 2 * packed.shape[1]), dtype=options[-1]),
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; x has no part in its own gradient."""
    x, packed, scale, global_scale, bias = inputs[:5]
    ctx.save_for_backward(packed, scale, global_scale)
    ctx.x_dtype, ctx.bias_dtype, ctx.format = x.dtype, None if bias is None else bias.dtype, inputs[6]


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    grad = grad.contiguous()
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = BACKWARD_OP(grad, *ctx.saved_tensors, ctx.format, ctx.x_dtype, backend=ctx.backend)
    if ctx.needs_input_grad[4]:
        dbias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
    return dx, None, None, None, dbias, None, None, None, None, None
