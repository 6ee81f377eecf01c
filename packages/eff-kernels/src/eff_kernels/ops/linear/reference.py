"""linear in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.linear.args import Args


def linear(*args: *Args) -> Tensor:
    """Y [T, N] of x [T, K] and weight [N, K], summed in the wider of the two dtypes, of ``x.dtype``."""
    x, weight, bias = args
    wide = torch.promote_types(x.dtype, weight.dtype)
    # Strided rows would be summed in an order, and with an error, that depend on the processor.
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.nn.functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return y.to(x.dtype)
