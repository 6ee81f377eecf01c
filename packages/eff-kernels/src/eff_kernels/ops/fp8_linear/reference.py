"""fp8_linear in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.fp8_linear.args import Args, BackwardArgs
from eff_kernels.ops.fp8_quantize import reference


def fp8_linear(*args: *Args) -> Tensor:
    """Y [T, N] of x [T, K] and weight [N, K]; with float64 inputs all but the rounding of x is in float64."""
    x, weight, scale, bias, activations, out_dtype = args
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    row_scale = None
    if activations == "dynamic":
        codes, row_scale = reference.quantize(x, weight.dtype, False)
        x = codes.view(weight.dtype)
    y = x.to(wide) @ weight.to(wide).t()
    if row_scale is not None:
        y = y * row_scale.to(wide)[:, None]
    y = y * scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(out_dtype)


def fp8_linear_backward(*args: *BackwardArgs) -> Tensor:
    """Gradient dX [T, K] = dY [T, N] @ dequantised weight [N, K]: rounding x counts as the identity."""
    grad, weight, scale, dtype = args
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return ((grad.to(wide) * scale.to(wide)) @ weight.to(wide)).to(dtype)
