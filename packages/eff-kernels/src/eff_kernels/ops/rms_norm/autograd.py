"""Backward of rms_norm and add_rms_norm: one op for both, which adds the residual's gradient in the same pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.rms_norm import cpu, reference
from eff_kernels.ops.rms_norm.args import BackwardArgs

BACKWARD_OP = Op(
    "rms_norm_backward",
    schema_of(BackwardArgs, "(Tensor, Tensor)"),
    [
        Backend("cpu", cpu.rms_norm_backward, cpu.reject_backward),
        triton_backend("eff_kernels.ops.rms_norm.triton", run="rms_norm_backward", reject="reject_backward"),
        Backend("reference", reference.rms_norm_backward),
    ],
    fake=lambda grad, x, weight, eps, grad_residual: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the rows; their root mean square is computed again, which costs less than to store and load it."""
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Gradients to x, weight and eps."""
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = BACKWARD_OP(grad, x, weight, ctx.eps, None, backend=ctx.backend)
    return grad_x, grad_weight, None


def setup_add_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the sum, which is what was normalised."""
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def add_backward(ctx: Any, grad: Tensor, grad_residual: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients to x, residual (the same), weight and eps."""
    total, weight = ctx.saved_tensors
    grad_x, grad_weight = BACKWARD_OP(grad, total, weight, ctx.eps, grad_residual, backend=ctx.backend)
    return grad_x, grad_x, grad_weight, None
