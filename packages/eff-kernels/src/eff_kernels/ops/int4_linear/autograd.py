"""Gradient of int4_linear and int8_static_linear with respect to x: rounding and clamping count as the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.ops.int4_linear.common import weight_codes

_BLOCK = 512  # weight rows that are dequantised at a time


def input_gradient(
    grad: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Gradient dX [T, K] = dY [T, N] @ (codes [N, K] * scale [N] / input_scale [K])."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    scaled = grad.to(wide) * scale.to(wide)
    k = weight.size(1) * (2 if weight.dtype is torch.uint8 else 1)
    dx = scaled.new_zeros(grad.size(0), k)
    for n in range(0, weight.size(0), _BLOCK):
        dx = dx.addmm(scaled[:, n : n + _BLOCK], weight_codes(weight[n : n + _BLOCK]).to(wide))
    return (dx if input_scale is None else dx / input_scale.to(wide)).to(dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; x has no part in its own gradient."""
    x, weight, scale, bias, input_scale, _ = inputs
    ctx.save_for_backward(weight, scale, input_scale)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    weight, scale, input_scale = ctx.saved_tensors
    dx = input_gradient(grad, weight, scale, input_scale, ctx.x_dtype) if ctx.needs_input_grad[0] else None
    dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None, None
