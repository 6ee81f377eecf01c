"""Gradient of int8_linear with respect to its input, as an op of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.int8_linear import reference

_BLOCK = 512  # weight rows that are dequantised at a time


def _blocked(grad: Tensor, weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = grad.float() * (absmax / 127)
    out = scaled.new_zeros(grad.size(0), weight.size(1))
    for n in range(0, weight.size(0), _BLOCK):
        out.addmm_(scaled[:, n : n + _BLOCK], weight[n : n + _BLOCK].float())
    return out.to(dtype)


def _reject_blocked(grad: Tensor, *_: object) -> str | None:
    return None if grad.device.type == "cpu" else f"needs CPU tensors, got the gradient on {grad.device}"


BACKWARD_OP = Op(
    "int8_linear_backward",
    "(Tensor grad, Tensor weight, Tensor absmax, ScalarType dtype) -> Tensor",
    [
        Backend("cpu", _blocked, _reject_blocked),
        triton_backend("eff_kernels.ops.int8_linear.triton_float", run="backward", reject="reject_backward"),
        Backend("reference", reference.int8_linear_backward),
    ],
    fake=lambda grad, weight, absmax, dtype: grad.new_empty((grad.shape[0], weight.shape[1]), dtype=dtype),
)
