"""Feature maps and scopes of the linear branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("softmax", "elu", "relu")


LINEAR_SCOPES = ("marginal", "noncritical", "all")


def feature(x: Tensor, name: str) -> Tensor:
    """The feature map phi: softmax over the features, elu + 1, or relu."""
    if name == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if name == "elu" else x.relu()


def feature_backward(grad: Tensor, x: Tensor, y: Tensor, name: str) -> Tensor:
    """Gradient of phi at x, where y = phi(x)."""
    if name == "softmax":
        return y * (grad - (grad * y).sum(-1, keepdim=True))
    return grad * torch.where(x > 0, 1, y) if name == "elu" else grad * (x > 0)


def in_scope(mask: Tensor, linear_scope: str) -> Tensor:
    """Which blocks the linear branch takes: those of class 0 in the paper, or all but the critical, or all."""
    if linear_scope == "all":
        return torch.ones_like(mask, dtype=torch.bool)
    return mask == 0 if linear_scope == "marginal" else mask <= 0


def add(
    sparse_grads: tuple[Tensor, Tensor, Tensor], linear_grads: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients through both branches."""
    dq, dk, dv = (b.add_(a).to(a.dtype) for a, b in zip(sparse_grads, linear_grads, strict=True))
    return dq, dk, dv
