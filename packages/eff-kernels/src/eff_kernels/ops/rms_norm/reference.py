"""RMSNorm in plain PyTorch, the truth that every backend is held to; in float32, or float64 for float64 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.rms_norm.args import AddArgs, Args, BackwardArgs


def rms_norm(*args: *Args) -> Tensor:
    """Give x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich 2019, equation 4), rounded once to ``x.dtype``."""
    x, weight, eps = args
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * scale * weight.to(wide)).to(x.dtype).contiguous()


def add_rms_norm(*args: *AddArgs) -> tuple[Tensor, Tensor]:
    """Give (rms_norm(x + residual), x + residual); the sum is rounded to ``x.dtype`` before it is normalised."""
    x, residual, weight, eps = args
    total = (x + residual).contiguous()
    return rms_norm(total, weight, eps), total


def rms_norm_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` to x and weight; ``grad_residual``, if any, is added to the first.

    With n = x / rms(x) and g = grad * weight: dx = (g - n * mean(g * n)) / rms(x), dweight = sum over rows of grad * n.
    """
    grad, x, weight, eps, grad_residual = args
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
