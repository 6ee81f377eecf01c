"""Row-wise rounding to FP8 in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.fp8_quantize.args import Args
from eff_kernels.ops.fp8_quantize.common import EPS


def quantize(*args: *Args) -> tuple[Tensor, Tensor]:
    """Codes as bytes [T, K] and scales [T] of x [T, K]."""
    x, dtype, power_of_two = args
    x = x.float()
    amax = x.abs().amax(1) if x.size(1) else x.new_zeros(x.size(0))
    scale = scale_of(amax, dtype, power_of_two)
    scaled = torch.where(scale.isnan()[:, None], torch.nan, x / scale[:, None])
    most = torch.finfo(dtype).max
    return scaled.clamp(-most, most).to(dtype).view(torch.uint8), scale


def round_rows(*args: *Args) -> Tensor:
    """The numbers [T, K] for which the codes of x [T, K] stand, of ``x.dtype``."""
    x, dtype, power_of_two = args
    codes, scale = quantize(x, dtype, power_of_two)
    return (codes.view(dtype).float() * scale[:, None]).to(x.dtype)


def scale_of(amax: Tensor, dtype: torch.dtype, power_of_two: bool, eps: float = EPS) -> Tensor:
    """The scale for entries of magnitude up to ``amax`` (float32); NaN for NaN and infinity, which have none."""
    scale = torch.where(amax.isfinite(), amax, torch.nan).clamp(min=eps) / torch.finfo(dtype).max
    if power_of_two:  # rounded up: 2 ** ceil(log2(scale)), exactly
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)
        scale = torch.where(amax.isfinite(), scale, torch.nan)
    return scale
