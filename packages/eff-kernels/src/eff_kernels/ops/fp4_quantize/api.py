"""fp4_quantize and fp4_dequantize: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.common import check_float
from eff_kernels.ops.fp4_quantize import cpu, reference
from eff_kernels.ops.fp4_quantize.args import Args, DequantizeArgs
from eff_kernels.ops.fp4_quantize.common import (
    BLOCKS,
    block_of,
    check_codes,
    check_global_scale,
    check_scale_rounding,
    global_scale_of,
)

Format = Literal["nvfp4", "mxfp4"]
ScaleRounding = Literal["floor", "even", "ceil", "rceil"]

OP = Op(
    "fp4_quantize",
    schema_of(Args, "(Tensor, Tensor)"),
    [
        Backend("cpu", cpu.quantize, cpu.reject),
        triton_backend("eff_kernels.ops.fp4_quantize.triton"),
        Backend("reference", reference.quantize),
    ],
    fake=lambda x, global_scale, format, scale_rounding: (
        x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8),
        x.new_empty((x.shape[0], x.shape[1] // BLOCKS[format]), dtype=torch.uint8),
    ),
)

DEQUANTIZE_OP = Op(
    "fp4_dequantize",
    schema_of(DequantizeArgs, "Tensor"),
    [Backend("cpu", cpu.dequantize, cpu.reject_dequantize), Backend("reference", reference.dequantize)],
    fake=lambda packed, *options: packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=options[-1]),
)


class FP4Codes(NamedTuple):
    """A tensor [..., K] in 4-bit floats: value = code * scale * global_scale.

    Attributes:
        packed: uint8 [..., K/2], two E2M1 codes a byte, the even index in the low half.
        scale: nvfp4: float8_e4m3fn [..., K/16]; mxfp4: uint8 [..., K/32], b stands for 2^(b - 127), 255 for NaN.
        global_scale: s_g, a float32 scalar; None for mxfp4. Files of compressed-tensors hold 1 / s_g.
    """

    packed: Tensor
    scale: Tensor
    global_scale: Tensor | None


def fp4_quantize(
    x: Tensor,
    format: Format,
    *,
    scale_rounding: ScaleRounding = "floor",
    global_scale: Tensor | None = None,
    backend: str = "auto",
) -> FP4Codes:
    """Round to 4-bit floats (E2M1) with a scale for each block along the last axis.

    mxfp4: blocks of 32, scale 2^e, e = floor(log2(max |x|)) - 2 in [-127, 127] (OCP Microscaling v1.0, section 6.3).
    nvfp4: blocks of 16, scale E4M3(max |x| / 6 / s_g) in [2^-6, 448], with s_g = max |tensor| / (6 * 448).
    Codes are the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: ties to even, beyond 6 to 6, -0 kept.

    Args:
        x: [..., K], K a multiple of the block; any float dtype. Arithmetic is in float32.
        format: "nvfp4" or "mxfp4".
        scale_rounding: For mxfp4, how 2^e is chosen: "floor"; "even", which rounds the largest magnitude to E2M1's
            precision first (as compressed-tensors does); "ceil"; "rceil", the least power that lets nothing saturate,
            ceil(log2(max |x| / 6)). nvfp4 has no such choice.
        global_scale: For nvfp4, s_g as a tensor of one positive number; computed from ``x`` by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        FP4Codes. A block of zeros has the least scale. A block with a NaN has scale NaN and codes 0. An infinity in
        mxfp4 gets a scale so large that it stays one, and its neighbours become 0; in nvfp4 it saturates where s_g is
        given. Where s_g is computed, an infinity or a NaN anywhere makes every value NaN.

    Raises:
        ValueError: unknown format or rounding, K not a multiple of the block, or an option of the other format.
        TypeError: ``x`` is not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.

    Example:
        >>> fp4_quantize(torch.tensor([6.0, -4.0] + [0.5] * 30), "mxfp4").packed[:3]
        tensor([231,  17,  17], dtype=torch.uint8)
    """
    block = block_of(format)
    check_float(x)
    if x.dim() == 0 or x.shape[-1] % block:
        raise ValueError(f"{format} needs a last axis that is a multiple of {block}, got shape {list(x.shape)}")
    check_scale_rounding(scale_rounding, format)
    global_scale = check_global_scale(global_scale, format, "global_scale")
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if format == "nvfp4" and global_scale is None:
        global_scale = global_scale_of(rows)
    packed, scale = OP(rows, global_scale, format, scale_rounding, backend=backend)
    if format == "nvfp4":
        scale = scale.view(torch.float8_e4m3fn)
    if x.dim() != 2:
        packed, scale = packed.view(*x.shape[:-1], -1), scale.view(*x.shape[:-1], -1)
    return FP4Codes(packed, scale, global_scale)


def fp4_dequantize(
    codes: FP4Codes, format: Format, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> Tensor:
    """Values of 4-bit floats: code * (scale * global_scale), computed in float32 and rounded once to ``dtype``.

    Args:
        codes: As `fp4_quantize` gives them, or as a file holds them with ``global_scale`` turned over.
        format: "nvfp4" or "mxfp4".
        dtype: Float dtype of the result.
        backend: "auto", "cpu" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., K] of ``dtype``.

    Raises:
        ValueError: unknown format, or shapes that do not fit.
        TypeError: ``packed`` or ``scale`` of another dtype than the format's.
        BackendError: the named backend cannot run this call; the message says why.
    """
    global_scale = check_codes(*codes, format)
    packed, scale = codes.packed, codes.scale.view(torch.uint8)
    if packed.dim() == 2:
        values: Tensor = DEQUANTIZE_OP(packed, scale, global_scale, format, dtype, backend=backend)
        return values
    lead = packed.shape[:-1]
    packed, scale = (t.reshape(lead.numel(), t.shape[-1]) for t in (packed, scale))
    values = DEQUANTIZE_OP(packed, scale, global_scale, format, dtype, backend=backend)
    return values.view(*lead, -1)
