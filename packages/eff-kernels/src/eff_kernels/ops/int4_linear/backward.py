"""Gradient of int4_linear and int8_static_linear with respect to x: rounding and clamping count as the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.int4_linear.reference import weight_codes

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
