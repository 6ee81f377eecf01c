"""Rotary position embedding in plain PyTorch, the truth that every backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.rope.args import Args


def rope(*args: *Args) -> Tensor:
    """Turn each pair of features by its angle (Su et al. 2021, equation 15), in float32 or more, rounded once."""
    x, cos, sin, interleaved, inverse = args
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = (t.to(wide).unsqueeze(1) for t in (cos, sin))
    if inverse:
        s = -s
    pairs = cos.size(-1)
    turned, kept = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2].to(wide), turned[..., 1::2].to(wide)
        y = torch.stack((first * c - second * s, second * c + first * s), -1).flatten(-2)
    else:
        first, second = turned[..., :pairs].to(wide), turned[..., pairs:].to(wide)
        y = torch.cat((first * c - second * s, second * c + first * s), -1)
    return torch.cat((y.to(x.dtype), kept), -1).contiguous()
