"""Weights and activations to FP4 and back, in little memory; the tensor scale of NVFP4; fake quantisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from eff_kernels import FP4Codes, fp4_dequantize, fp4_quantize
from torch import Tensor

from eff_quant.fp4.config import BLOCK, Format, FP4Config

# Rows are taken in pieces of about this many weights, so that the temporaries stay in the cache.
PIECE = 2**18

# The largest value of E2M1 and of E4M3: what one NVFP4 block scale and one value can hold together.
E2M1_MAX = 6.0
E4M3_MAX = 448.0
# Beyond this the reciprocal of tensor scale and block scale together would be infinite.
LARGEST_RECIPROCAL = 2.0**120


class FP4Weight(NamedTuple):
    """A weight [N, K] as compressed-tensors holds it.

    Attributes:
        packed: Two codes a byte, uint8 [N, K/2].
        scale: Block scales, float8_e4m3fn [N, K/16] (nvfp4) or uint8 [N, K/32] (mxfp4).
        reciprocal: 1 over the tensor scale, float32 [1]; None for mxfp4.
    """

    packed: Tensor
    scale: Tensor
    reciprocal: Tensor | None

    @property
    def codes(self) -> FP4Codes:
        """The same for the ops of eff_kernels, whose tensor scale multiplies."""
        return FP4Codes(self.packed, self.scale, multiplier(self.reciprocal))


def multiplier(reciprocal: Tensor | None) -> Tensor | None:
    """The tensor scale that multiplies codes, a scalar, from the reciprocal that files hold."""
    return None if reciprocal is None else reciprocal.reciprocal().reshape(())


def reciprocal_scale(amax: Tensor) -> Tensor:
    """The tensor scale of NVFP4 as files hold it, 6 * 448 / amax, float32 [1]; 1 for a tensor of zeros.

    The scale that multiplies codes is the reciprocal of this number.
    """
    # torch multiplies 1 / amax by a number on the left, and so it does in compressed-tensors: the same bits
    scale = (E2M1_MAX * E4M3_MAX / amax.float()).clamp_max(LARGEST_RECIPROCAL)
    return torch.where(amax == 0, torch.ones_like(scale), scale).reshape(1)


def shared_reciprocal_scale(weights: Iterable[Tensor]) -> Tensor:
    """The `reciprocal_scale` of several weights that serving engines run as one: that of the largest magnitude.

    Raises:
        ValueError: a weight holds inf or NaN; the message names the row.
    """
    return torch.stack([reciprocal_scale(largest_magnitude(w)) for w in weights]).amin(0)


def largest_magnitude(weight: Tensor) -> Tensor:
    """The largest absolute value of a weight [N, K], a float32 scalar.

    Raises:
        ValueError: the weight holds inf or NaN; the message names the row.
    """
    largest = torch.zeros((), dtype=torch.float32, device=weight.device)
    if weight.is_meta:
        return largest
    for start, piece in _pieces(weight.detach()):
        largest = torch.maximum(largest, _largest_of_piece(start, piece))
    return largest


def _largest_of_piece(start: int, piece: Tensor) -> Tensor:
    low, high = piece.aminmax()
    largest = torch.maximum(-low, high).float()
    if not torch.isfinite(largest):
        row = start + int(torch.nonzero(~torch.isfinite(piece).all(dim=1))[0])
        raise ValueError(f"weight row {row} holds inf or NaN; FP4 needs finite weights")
    return largest


def quantize_weight(weight: Tensor, config: FP4Config, *, reciprocal: Tensor | None = None) -> FP4Weight:
    """Quantise a weight [N, K] of any float dtype, from its float32 values.

    Args:
        weight: The weight.
        config: format and scale_rounding act here.
        reciprocal: The tensor scale as files hold it (nvfp4), where a group of weights shares one.

    Raises:
        TypeError: the weight is not floating.
        ValueError: the weight is not a matrix, K is not a multiple of the block, or the weight holds inf or NaN.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; FP4 takes a floating weight")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; FP4 takes a matrix [N, K]")
    if reason := shape_refusal(weight.shape[1], config.format):
        raise ValueError(f"weight {list(weight.shape)}: {reason}")
    weight = weight.detach()
    new = empty_weight(weight.shape[0], weight.shape[1], config.format, weight.device)
    if weight.is_meta:
        return new
    checked = config.format == "nvfp4" and reciprocal is None
    if checked:
        reciprocal = reciprocal_scale(largest_magnitude(weight))
    if reciprocal is not None:
        new = new._replace(reciprocal=reciprocal.to(weight.device, copy=True))  # files hold one for each layer
    global_scale = new.codes.global_scale
    for start, piece in _pieces(weight):
        if not checked:
            _largest_of_piece(start, piece)
        rows = slice(start, start + len(piece))
        part = fp4_quantize(piece, config.format, scale_rounding=config.scale_rounding, global_scale=global_scale)
        new.packed[rows], new.scale[rows] = part.packed, part.scale
    return new


def dequantize_weight(codes: FP4Codes, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [N, K] that the codes stand for, computed in float32 and cast to ``dtype``."""
    weight = torch.empty(len(codes.packed), 2 * codes.packed.shape[1], dtype=dtype, device=codes.packed.device)
    for start, piece in _pieces(codes.packed):
        rows = slice(start, start + len(piece))
        weight[rows] = fp4_dequantize(codes._replace(packed=piece, scale=codes.scale[rows]), format, dtype=dtype)
    return weight


def empty_weight(n: int, k: int, format: Format, device: torch.device | str | None) -> FP4Weight:
    """A weight [n, k] of zeros."""
    nvfp4 = format == "nvfp4"
    scale_dtype = torch.float8_e4m3fn if nvfp4 else torch.uint8
    return FP4Weight(
        torch.zeros(n, k // 2, dtype=torch.uint8, device=device),
        torch.zeros(n, k // BLOCK[format], dtype=scale_dtype, device=device),
        torch.ones(1, dtype=torch.float32, device=device) if nvfp4 else None,
    )


def shape_refusal(in_features: int, format: Format) -> str:
    """Why a layer with so many inputs cannot be stored in this format; "" if it can."""
    if in_features % BLOCK[format]:
        return f"in_features={in_features} is not a multiple of {BLOCK[format]}, the block of {format}"
    return ""


def _pieces(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Consecutive rows of a matrix, about `PIECE` numbers at a time, with the number of the first."""
    rows = max(1, PIECE // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0] if matrix.shape[1] else 0, rows):
        yield start, matrix[start : start + rows]
