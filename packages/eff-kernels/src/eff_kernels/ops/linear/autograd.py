"""Gradients of linear: products of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep both factors."""
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to x, weight and bias."""
    x, weight = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, weight.dtype)
    grad = grad.to(wide)
    dx = (grad @ weight.to(wide)).to(x.dtype) if ctx.needs_input_grad[0] else None
    dweight = (grad.t() @ x.to(wide)).to(weight.dtype) if ctx.needs_input_grad[1] else None
    dbias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, dweight, dbias
