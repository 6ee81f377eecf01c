"""fp4_linear in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.fp4_linear.args import Args, BackwardArgs
from eff_kernels.ops.fp4_quantize import reference
from eff_kernels.ops.fp4_quantize.common import global_scale_of


def fp4_linear(*args: *Args) -> Tensor:
    """Y [T, N] of x [T, K] and packed [N, K/2]; with float64 inputs all but the choice of codes is in float64."""
    x, packed, scale, global_scale, bias, input_global_scale, format, activations, scale_rounding, out_dtype = args
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if activations == "dynamic":
        x = fake_quantize(x, input_global_scale, format, scale_rounding, wide)
    y = x.to(wide) @ reference.dequantize(packed, scale, global_scale, format, wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(out_dtype)


def fake_quantize(
    x: Tensor, global_scale: Tensor | None, format: str, scale_rounding: str, dtype: torch.dtype
) -> Tensor:
    """What is left of x after a round trip through the format."""
    if format == "nvfp4" and global_scale is None:
        global_scale = global_scale_of(x)
    codes, scale = reference.quantize(x, global_scale, format, scale_rounding)
    return reference.dequantize(codes, scale, global_scale, format, dtype)


def fp4_linear_backward(*args: *BackwardArgs) -> Tensor:
    """Gradient dX [T, K] = dY [T, N] @ dequantised weight [N, K]: rounding x counts as the identity."""
    grad, packed, scale, global_scale, format, dtype = args
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return (grad.to(wide) @ reference.dequantize(packed, scale, global_scale, format, wide)).to(dtype)
