"""int4_linear and int8_static_linear in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.int8_quantize.reference import inverse_scale


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


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Y [T, N] of x [T, K] and codes [N, K]; with float64 inputs all but the choice of codes is in float64."""
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
