"""Gradient of fp4_linear with respect to its input, as an op of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.fp4_linear import reference
from eff_kernels.ops.fp4_quantize.api import DEQUANTIZE_OP

_BLOCK = 512  # weight rows that are dequantised at a time


def _blocked(
    grad: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype
) -> Tensor:
    wide = grad.float()
    out = wide.new_zeros(grad.size(0), 2 * packed.size(1))
    scale = scale.view(torch.uint8)
    for n in range(0, packed.size(0), _BLOCK):
        rows = slice(n, n + _BLOCK)
        out.addmm_(wide[:, rows], DEQUANTIZE_OP(packed[rows], scale[rows], global_scale, format, torch.float32))
    return out.to(dtype)


def _reject_blocked(
    grad: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype
) -> str | None:
    if grad.device.type != "cpu":
        return f"needs CPU tensors, got the gradient on {grad.device}"
    if grad.dtype == torch.float64 or dtype == torch.float64:
        return "sums in float32, got float64"
    return None


BACKWARD_OP = Op(
    "fp4_linear_backward",
    "(Tensor grad, Tensor packed, Tensor scale, Tensor? global_scale, str format, ScalarType dtype) -> Tensor",
    [
        Backend("cpu", _blocked, _reject_blocked),
        triton_backend("eff_kernels.ops.fp4_linear.triton", run="backward", reject="reject_backward"),
        Backend("reference", reference.fp4_linear_backward),
    ],
    fake=lambda grad, packed, scale, global_scale, format, dtype: grad.new_empty(
        (grad.shape[0], 2 * packed.shape[1]), dtype=dtype
    ),
)
