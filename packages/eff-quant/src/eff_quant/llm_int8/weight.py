"""Row-wise int8 quantisation of a weight matrix, bit for bit as bitsandbytes does it, in little memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from eff_kernels import int8_quantize_rows
from torch import Tensor

# Rows are taken in blocks of about this many weights, so that the temporaries stay at a few MiB for any layer.
BLOCK = 2**20

_HALF = torch.finfo(torch.float16)


class Int8Weight(NamedTuple):
    """Codes int8 [N, K] and absmax fp32 [N] of a weight; the weight is about ``codes * absmax[:, None] / 127``."""

    codes: Tensor
    absmax: Tensor


def quantize_weight(weight: Tensor) -> Int8Weight:
    """Quantise a weight [N, K] of any float dtype to int8 with one absmax per row.

    Rows are cast to float16 first, as bitsandbytes does, so that both give the same bytes. A row that float16 cannot
    hold (its largest entry above 65504 or below 2**-14) is quantised from float32 instead of being lost.

    Raises:
        TypeError: the weight is not floating.
        ValueError: the weight is not a matrix, or holds inf or NaN; the message names the row.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; int8 quantisation takes a floating weight")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; int8 quantisation takes a matrix [N, K]")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    if weight.is_meta or weight.numel() == 0:
        return Int8Weight(codes, absmax.zero_())
    rows = max(1, BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        codes[part], absmax[part] = _quantize_block(weight[part].detach(), start)
    return Int8Weight(codes, absmax)


def _quantize_block(block: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    largest = block.abs().amax(dim=1).float()
    if not torch.isfinite(largest).all():
        row = first_row + int(torch.nonzero(~torch.isfinite(largest))[0])
        raise ValueError(f"weight row {row} holds inf or NaN; int8 needs finite weights")
    result = int8_quantize_rows(block.to(torch.float16))
    codes, absmax = result.codes, result.absmax
    lost = (largest > _HALF.max) | ((largest < _HALF.tiny) & (largest > 0))
    if lost.any():
        exact = int8_quantize_rows(block[lost].float())
        codes[lost], absmax[lost] = exact.codes, exact.absmax
    return codes, absmax


def dequantize_weight(codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``codes * absmax / 127`` [N, K], computed in float32 and cast to ``dtype``."""
    return (codes * (absmax / 127).unsqueeze(1)).to(dtype)
