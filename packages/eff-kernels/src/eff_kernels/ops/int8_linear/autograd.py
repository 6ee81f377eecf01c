"""Gradient of int8_linear with respect to its input, as an op of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.int8_linear import reference
from eff_kernels.ops.int8_linear.args import BackwardArgs

_BLOCK = 512  # weight rows that are dequantised at a time


def _blocked(*args: *BackwardArgs) -> Tensor:
    grad, weight, absmax, dtype = args
    scaled = grad.float() * (absmax / 127)
    out = scaled.new_zeros(grad.size(0), weight.size(1))
    for n in range(0, weight.size(0), _BLOCK):
        out.addmm_(scaled[:, n : n + _BLOCK], weight[n : n + _BLOCK].float())
    return out.to(dtype)


def _reject_blocked(grad: Tensor, *_: object) -> str | None:
    return None if grad.device.type == "cpu" else f"needs CPU tensors, got the gradient on {grad.device}"


BACKWARD_OP = Op(
    "int8_linear_backward",
    schema_of(BackwardArgs, "Tensor"),
    [
        Backend("cpu", _blocked, _reject_blocked),
        triton_backend("eff_kernels.ops.int8_linear.triton_float", run="backward", reject="reject_backward"),
        Backend("reference", reference.int8_linear_backward),
    ],
    fake=lambda grad, weight, absmax, dtype: grad.new_empty((grad.shape[0], weight.shape[1]), dtype=dtype),
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; x has no part in its own gradient."""
    x, weight, absmax, bias = inputs[:4]
    ctx.save_for_backward(weight, absmax)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    weight, absmax = ctx.saved_tensors
    grad = grad.contiguous()
    dx = BACKWARD_OP(grad, weight, absmax, ctx.x_dtype, backend=ctx.backend) if ctx.needs_input_grad[0] else None
    dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None, None, None, None, None
