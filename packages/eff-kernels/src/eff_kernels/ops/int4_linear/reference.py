"""int4_linear and int8_static_linear in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.int4_linear.args import Args
from eff_kernels.ops.int4_linear.common import weight_codes
from eff_kernels.ops.int8_quantize.reference import inverse_scale


def linear(*args: *Args) -> Tensor:
    """Y [T, N] of x [T, K] and codes [N, K]; with float64 inputs all but the choice of codes is in float64."""
    x, weight, scale, bias, input_scale, out_dtype = args
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    codes, row_scale = activation_codes(x, input_scale)
    # float64 holds the integer sums exactly (float32 would not, from K = 16384 on).
    sums = codes.double() @ weight_codes(weight).double().t()
    y = sums.to(wide) * row_scale.to(wide)[:, None] * scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(out_dtype)


def activation_codes(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integers [T, K] as float32, and the factor of each row [T], NaN for a row that no codes stand for."""
    x = x.float()
    if input_scale is None:
        absmax = x.abs().amax(1) if x.size(1) else x.new_zeros(x.size(0))
        absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
        return (x * inverse_scale(absmax)[:, None]).round().nan_to_num(0.0), absmax / 127
    steps = x / input_scale.float()
    row_scale = torch.where(steps.isfinite().all(1), 1.0, torch.nan)
    return steps.round().clamp(-128, 127).nan_to_num(0.0), row_scale
