"""RMSNorm in plain PyTorch, the truth that every backend is held to; in float32, or float64 for float64 rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Give x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich 2019, equation 4), rounded once to ``x.dtype``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * scale * weight.to(wide)).to(x.dtype).contiguous()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give (rms_norm(x + residual), x + residual); the sum is rounded to ``x.dtype`` before it is normalised."""
    total = (x + residual).contiguous()
    return rms_norm(total, weight, eps), total


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` to x and weight; ``grad_residual``, if any, is added to the first.

    With n = x / rms(x) and g = grad * weight: dx = (g - n * mean(g * n)) / rms(x), dweight = sum over rows of grad * n.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, upper = x.to(wide), grad.to(wide)
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    normed = rows * scale
    g = upper * weight.to(wide)
    grad_x = (g - normed * (g * normed).mean(-1, keepdim=True)) * scale
    if grad_residual is not None:
        grad_x = grad_x + grad_residual.to(wide)
    grad_weight = (upper * normed).flatten(0, -2).sum(0) if x.dim() > 1 else upper * normed
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype).contiguous()
