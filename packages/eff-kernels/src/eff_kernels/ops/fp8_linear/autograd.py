"""Gradient of fp8_linear with respect to its input, as an op of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.fp8_linear import reference
from eff_kernels.ops.fp8_linear.args import BackwardArgs

_BLOCK = 512  # weight rows that are decoded at a time


def _blocked(*args: *BackwardArgs) -> Tensor:
    grad, weight, scale, dtype = args
    scaled = grad.float() * scale
    out = scaled.new_zeros(grad.size(0), weight.size(1))
    for n in range(0, weight.size(0), _BLOCK):
        out.addmm_(scaled[:, n : n + _BLOCK], decode(weight[n : n + _BLOCK]))
    return out.to(dtype)


def decode(codes: Tensor) -> Tensor:
    """FP8 as float32 by its bits, exactly; PyTorch's cast takes some ten times as long on a CPU."""
    bits = codes.contiguous().view(torch.int8).short()  # the sign fills the upper byte
    if codes.dtype == torch.float8_e5m2:
        return (bits << 8).view(torch.float16).float()
    bits = (bits << 7) & -0x4080
    bits |= ((bits & 0x3F80) == 0x3F80).short() * 0x7E00
    return bits.view(torch.float16).float().mul_(256)


def _reject_blocked(grad: Tensor, *_: object) -> str | None:
    if grad.dtype == torch.float64:
        return "sums in float32, got float64"
    return None if grad.device.type == "cpu" else f"needs CPU tensors, got the gradient on {grad.device}"


BACKWARD_OP = Op(
    "fp8_linear_backward",
    schema_of(BackwardArgs, "Tensor"),
    [
        Backend("cpu", _blocked, _reject_blocked),
        triton_backend("eff_kernels.ops.fp8_linear.triton", run="backward", reject="reject_backward"),
        Backend("reference", reference.fp8_linear_backward),
    ],
    fake=lambda grad, weight, scale, dtype: grad.new_empty((grad.shape[0], weight.shape[1]), dtype=dtype),
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; x has no part in its own gradient."""
    x, weight, scale, bias = inputs[:4]
    ctx.save_for_backward(weight, scale)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    weight, scale = ctx.saved_tensors
    grad = grad.contiguous()
    dx = BACKWARD_OP(grad, weight, scale, ctx.x_dtype, backend=ctx.backend) if ctx.needs_input_grad[0] else None
    dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None, None
