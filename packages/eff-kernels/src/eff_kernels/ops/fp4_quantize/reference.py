"""NVFP4 and MXFP4 in plain PyTorch (OCP Microscaling v1.0; NVIDIA NVFP4): the readable truth, on any device.

Block scales travel as their bytes (uint8): E8M0 for mxfp4, E4M3 for nvfp4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from eff_kernels.ops.fp4_quantize.args import Args, DequantizeArgs
from eff_kernels.ops.fp4_quantize.common import BLOCKS, LARGEST_E4M3, SMALLEST_E4M3

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 codes of E2M1 stand for: sign, two bits of exponent (bias 1), one of mantissa."""

_NAN_E8M0, _NAN_E4M3 = 255, 127


def quantize(*args: *Args) -> tuple[Tensor, Tensor]:
    """Packed codes [R, K/2] and bytes of the block scales [R, K/block] of x [R, K]."""
    x, global_scale, format, scale_rounding = args
    blocks = x.float().reshape(x.size(0), x.size(1) // BLOCKS[format], BLOCKS[format])
    absmax = blocks.abs().amax(-1)
    if format == "mxfp4":
        scale = _e8m0(absmax, scale_rounding)
        # 1 / 2^(b - 127) from its bits; b = 254 belongs to infinity alone, and its inverse is not a normal number.
        inverse = ((254 - scale.int()).clamp(min=0) << 23).view(torch.float32).masked_fill(scale == 254, 2.0**-127)
        bad = scale == _NAN_E8M0
    else:
        assert global_scale is not None
        global_scale = global_scale.float()
        stored = (absmax / 6 / global_scale).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
        scale = stored.view(torch.uint8)
        # In this order, as torchao: a division of x by the two scales would break some ties differently.
        inverse = (1 / global_scale) / stored.float()
        bad = scale & 127 == _NAN_E4M3
    codes = encode(blocks * inverse[..., None]).masked_fill(bad[..., None], 0)
    scale = scale.masked_fill(bad, _NAN_E8M0 if format == "mxfp4" else _NAN_E4M3)
    return pack(codes.view(x.shape)), scale


def _e8m0(absmax: Tensor, rounding: str) -> Tensor:
    """Byte b of the shared scale 2^(b - 127), from the bits of the largest magnitude: log2 would round."""
    bits = (absmax / 6 if rounding == "rceil" else absmax).view(torch.int32)
    if rounding == "even":  # half a unit in the last place of E2M1 is added before the mantissa is cut off
        bits = bits + (1 << 21)
    exponent = bits >> 23
    if rounding == "ceil":
        exponent = exponent + ((bits & 0x7FFFFF) != 0)
    if rounding == "rceil":  # below the normal numbers, only what is above 2^-127 has an exponent of -126
        exponent = exponent + ((bits & 0x7FFFFF) > torch.where(exponent == 0, 0x400000, 0))
    else:
        exponent = exponent - 2
    return torch.where(absmax.isnan(), _NAN_E8M0, exponent.clamp(0, 254)).to(torch.uint8)


def encode(x: Tensor) -> Tensor:
    """Code (uint8) of the nearest E2M1 value, ties to the even mantissa, magnitudes above 6 to 6; -0 stays -0."""
    size = x.abs()
    size = torch.where(size < 6, size, 6.0)
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, [..., K] -> [..., K/2]: the even index in the low half."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def dequantize(*args: *DequantizeArgs) -> Tensor:
    """Values [R, K] of packed codes [R, K/2]: code * (block scale * s_g), in float32 (float64 if that is asked for)."""
    packed, scale, global_scale, format, dtype = args
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = _pairs(wide, packed.device)[packed.int()].flatten(-2)
    factor = scale_values(scale, global_scale, format, wide)
    return (values * factor.repeat_interleave(BLOCKS[format], -1)).to(dtype)


def scale_values(scale: Tensor, global_scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """Block scale * s_g as floats, from bytes."""
    if format == "mxfp4":
        powers = (scale.int() << 23).clamp(min=0x400000).view(torch.float32)  # b = 0 is half the least normal number
        return powers.masked_fill(scale == _NAN_E8M0, torch.nan).to(dtype)
    assert global_scale is not None
    return scale.view(torch.float8_e4m3fn).to(dtype) * global_scale.to(dtype)


@functools.cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of each byte, [256, 2]."""
    byte = torch.arange(256)
    table = torch.tensor(VALUES, dtype=dtype)
    return torch.stack((table[byte & 15], table[byte >> 4]), -1).to(device)
