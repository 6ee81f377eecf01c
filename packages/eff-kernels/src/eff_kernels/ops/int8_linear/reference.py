"""int8_linear in plain PyTorch (LLM.int8(), sections 2 and 3): the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.int8_linear.args import Args, BackwardArgs
from eff_kernels.ops.int8_quantize.reference import inverse_scale


def int8_linear(*args: *Args) -> Tensor:
    """Y [T, N] of x [T, K] and weight [N, K]; with float64 inputs all but the choice of codes is in float64."""
    x, weight, absmax, bias, threshold, per_token_outliers, activation, activation_group, out_dtype = args
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    absmax = absmax.to(wide)
    if activation == "none":
        y = x.to(wide) @ (weight.to(wide) * (absmax[:, None] / 127)).t()
    else:
        x = x.float()
        outlier = x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
        # In 16 bits go the outliers alone (per token), or every entry of a column that has one.
        taken = outlier if per_token_outliers else outlier.any(0).expand_as(outlier)
        inlier = x.masked_fill(outlier, 0.0)
        group = activation_group or max(x.size(1), 1)
        sums = torch.zeros(x.size(0), weight.size(0), dtype=wide, device=x.device)
        for k in range(0, x.size(1), group):  # one scale for each row of a group
            part = inlier[:, k : k + group]
            part_absmax = part.abs().amax(1)
            part_absmax = torch.where(part_absmax.isfinite(), part_absmax, torch.nan)
            codes = (part * inverse_scale(part_absmax)[:, None]).round()
            codes = codes.masked_fill(taken[:, k : k + group], 0.0).nan_to_num(0.0)
            # float64 holds the integer sums exactly for every K that int32 can (float32 would not, from K = 1041 on).
            exact = (codes.double() @ weight[:, k : k + group].double().t()).to(wide)
            sums += exact * (part_absmax.to(wide)[:, None] / 127)
        columns = taken.any(0).nonzero().view(-1)
        outlier_x = x.where(taken, 0.0)[:, columns].to(wide)
        outlier_sums = outlier_x @ weight[:, columns].to(wide).t()
        y = (sums + outlier_sums) * (absmax / 127)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(out_dtype)


def int8_linear_backward(*args: *BackwardArgs) -> Tensor:
    """Gradient dX [T, K] = dY [T, N] @ dequantised weight [N, K]: rounding x counts as the identity."""
    grad, weight, absmax, dtype = args
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return ((grad.to(wide) * (absmax / 127)) @ weight.to(wide)).to(dtype)
