"""Gradient of group_linear: straight through rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.ops.group_linear.pack import GroupWeight


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; x has no part in its own gradient."""
    x, packed, bias, *ctx.layout, _ = inputs
    ctx.save_for_backward(packed)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    dx = dbias = None
    precise = torch.promote_types(grad.dtype, torch.float32)
    if ctx.needs_input_grad[0]:
        (packed,) = ctx.saved_tensors
        weight = GroupWeight(packed, *ctx.layout).dequantize()
        dx = (grad.to(precise) @ weight.to(precise)).to(ctx.x_dtype)
    if ctx.needs_input_grad[2]:
        dbias = grad.sum(0, dtype=precise).to(ctx.bias_dtype)
    return dx, None, dbias, None, None, None, None, None, None
