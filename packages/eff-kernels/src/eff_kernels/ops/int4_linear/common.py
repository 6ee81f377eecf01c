"""Codes of a weight, packed and unpacked."""

from __future__ import annotations

import torch
from torch import Tensor


def int4_pack(codes: Tensor) -> Tensor:
    """Two codes from -8 to 7 to a byte, the one of the even index in the low half: [..., K] to uint8 [..., K / 2].

    Raises:
        ValueError: K is odd. Codes out of range are not looked for.
    """
    if codes.dim() == 0 or codes.size(-1) % 2:
        raise ValueError(f"the last dimension must be even, got shape {list(codes.shape)}")
    halves = codes.to(torch.uint8) & 15
    return halves[..., 0::2] | halves[..., 1::2] << 4


def int4_unpack(packed: Tensor) -> Tensor:
    """The codes in uint8 [..., K / 2] as int8 [..., K]; undoes `int4_pack`."""
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return (halves ^ 8).to(torch.int8) - 8


def weight_codes(weight: Tensor) -> Tensor:
    """Codes [N, K] of a weight: packed in uint8, or as they are in int8."""
    return int4_unpack(weight) if weight.dtype is torch.uint8 else weight
