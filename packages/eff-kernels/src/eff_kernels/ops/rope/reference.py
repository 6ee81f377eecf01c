"""Rotary position embedding in plain PyTorch, the truth that every backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """Turn each pair of features by its angle (Su et al. 2021, equation 15), in float32 or more, rounded once.

    Args:
        x: [B, H, T, D].
        cos: Cosine of the angle of each pair, [B or 1, T, R/2]; features from R on are copied.
        sin: Their sines.
        interleaved: Pairs are (2i, 2i+1), else (i, i + R/2).
        inverse: Turn by the negative angle: the inverse, which is also the gradient.
    """
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
