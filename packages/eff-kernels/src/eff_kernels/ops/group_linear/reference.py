"""group_linear in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.group_linear.args import Args
from eff_kernels.ops.group_linear.pack import GROUP, unpack

_TINY = 1e-36
"""Groups of smaller activations count as zero: 127 / them would not be finite."""


def activation_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes [T, groups, 32] as float32, and the step of each group [T, groups], NaN where none stand for it."""
    groups = x.float().unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(2)
    largest = torch.where(groups.isfinite().all(2), largest, torch.nan)
    inverse = torch.where(largest > _TINY, 127 / largest, 0.0)
    step = torch.where(largest.isnan(), torch.nan, torch.where(largest > _TINY, largest / 127, 0.0))
    return (groups * inverse[..., None]).round().nan_to_num(0.0), step


def group_linear(*args: *Args) -> Tensor:
    """Y [T, n] of x [T, K] and packed weights; with float64 inputs all but the choice of codes is in float64."""
    x, packed, bias, n, bits, offset, minima, wide, out_dtype = args
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    codes, scale, minimum = unpack(packed, n, bits, minima, wide)
    act, step = activation_codes(x)
    weight = codes.unflatten(1, (-1, GROUP)).double() - offset
    exact = torch.einsum("tgk,ngk->tng", act.double(), weight).to(precise)  # integers
    y = (exact * scale.to(precise) * step.to(precise)[:, None]).sum(2)
    if minimum is not None:
        y = y + (step.to(precise) * act.sum(2).to(precise)) @ minimum.to(precise).t()
    if bias is not None:
        y = y + bias.to(precise)
    return y.to(out_dtype)
