"""Triton kernel of fp4_quantize. Not yet run on a GPU: compiled and interpreted only.

Scales are found with integers alone: exponents from the bits of the largest magnitude, E4M3 by rounding those bits.
Every number is then the same on each GPU, and under the interpreter, whose conversions to float8 do not round to
nearest.

B: blocks of a program. V: values of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import AotCase
from eff_kernels.ops.fp4_quantize.args import Args
from eff_kernels.ops.fp4_quantize.common import BLOCKS, SCALE_ROUNDINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VALUES = 4096  # of a program
# A fused multiply-add would skip the rounding of the product in front of the sum that rounds to a code.
_OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def scale_bits(bits, ROUNDING: tl.constexpr):
    """E8M0 byte (as int32) of blocks whose largest magnitude has these bits, divided by 6 already for "rceil"."""
    if ROUNDING == "even":
        bits += 1 << 21
    exponent, rest = bits >> 23, bits & 0x7FFFFF
    if ROUNDING == "rceil":
        exponent += (rest > tl.where(exponent == 0, 0x400000, 0)).to(tl.int32)
    elif ROUNDING == "ceil":
        exponent += (rest > 0).to(tl.int32) - 2
    else:
        exponent -= 2
    return tl.minimum(tl.maximum(exponent, 0), 254)


@triton.jit
def encode(x):
    """Codes (int32) of the nearest E2M1 values: adding 1.5 * 2**n rounds half to even and leaves the code."""
    size = tl.abs(x)
    size = tl.where(size < 6.0, size, 6.0)
    rounder = tl.where(size < 2.0, 6291456.0, tl.where(size < 4.0, 12582912.0, 25165824.0))
    start = tl.where(size < 2.0, 0, tl.where(size < 4.0, 2, 4))
    code = (size + rounder).to(tl.int32, bitcast=True) - rounder.to(tl.int32, bitcast=True) + start
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def widen(x):
    """Float32 of what was loaded. bfloat16 by its bits: the interpreter's own conversion is wrong for subnormals."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _quantize_kernel(
    x_ptr, x_stride, global_ptr, packed_ptr, scale_ptr, blocks, across,
    NVFP4: tl.constexpr, ROUNDING: tl.constexpr, B: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    block_B = tl.program_id(0) * B + tl.arange(0, B)
    start_B = (block_B // across).to(tl.int64) * x_stride + (block_B % across) * V
    value_V = tl.arange(0, V)
    inside_B = block_B < blocks
    x_BV = widen(tl.load(x_ptr + start_B[:, None] + value_V[None, :], inside_B[:, None], other=0.0))
    bits_B = tl.max(x_BV.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # ordered as magnitudes are, NaN above all
    absmax_B = bits_B.to(tl.float32, bitcast=True)
    if NVFP4:
        s_g = tl.load(global_ptr)
        wanted_B = tl.div_rn(tl.div_rn(absmax_B, tl.full([B], 6.0, tl.float32)), tl.zeros([B], tl.float32) + s_g)
        bad_B = wanted_B != wanted_B
        wanted_B = tl.where(bad_B | (wanted_B < 0.015625), 0.015625, tl.where(wanted_B > 448.0, 448.0, wanted_B))
        near_B = wanted_B.to(tl.int32, bitcast=True)
        near_B = (near_B + 0x7FFFF + ((near_B >> 20) & 1)) >> 20
        stored_B = (near_B << 20).to(tl.float32, bitcast=True)
        one_over = tl.div_rn(tl.full([B], 1.0, tl.float32), tl.zeros([B], tl.float32) + s_g)
        inverse_B = tl.div_rn(one_over, stored_B)
        byte_B = tl.where(bad_B, 127, near_B - (120 << 3))
    else:
        bad_B = bits_B > 0x7F800000
        if ROUNDING == "rceil":
            bits_B = tl.div_rn(absmax_B, tl.full([B], 6.0, tl.float32)).to(tl.int32, bitcast=True)
        byte_B = scale_bits(tl.where(bad_B, 0, bits_B), ROUNDING)
        inverse_bits_B = tl.where(byte_B == 254, 0x400000, (254 - byte_B) << 23)
        inverse_B = inverse_bits_B.to(tl.float32, bitcast=True)
        byte_B = tl.where(bad_B, 255, byte_B)
    code_BV = tl.where(bad_B[:, None], 0, encode(x_BV * inverse_B[:, None]))
    even_BH, odd_BH = tl.split(tl.reshape(code_BV, [B, V // 2, 2]))
    offset_BH = block_B.to(tl.int64)[:, None] * (V // 2) + tl.arange(0, V // 2)[None, :]
    tl.store(packed_ptr + offset_BH, (even_BH | (odd_BH << 4)).to(tl.uint8), inside_B[:, None])
    tl.store(scale_ptr + block_B, byte_B.to(tl.uint8), inside_B)


def reject(*args: *Args) -> str | None:
    """Why the kernel cannot run this call."""
    x, *_ = args
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return None


def run(*args: *Args) -> tuple[Tensor, Tensor]:
    """As the reference, bit for bit."""
    x, global_scale, format, scale_rounding = args
    block = BLOCKS[format]
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, k = x.shape
    packed = x.new_empty(rows, k // 2, dtype=torch.uint8)
    scale = x.new_empty(rows, k // block, dtype=torch.uint8)
    if x.numel():
        per_program = _VALUES // block
        _quantize_kernel[(triton.cdiv(scale.numel(), per_program),)](
            x, x.stride(0), scale if global_scale is None else global_scale, packed, scale, scale.numel(), k // block,
            NVFP4=format == "nvfp4", ROUNDING=scale_rounding, B=per_program, V=block, **_OPTIONS,
        )  # fmt: skip
    return packed, scale


AOT_CASES = [
    AotCase(
        name=f"{format}-{rounding}-{name}",
        kernel=_quantize_kernel,
        signature={
            "x_ptr": f"*{name}", "x_stride": "i32", "global_ptr": "*fp32", "packed_ptr": "*u8", "scale_ptr": "*u8",
            "blocks": "i32", "across": "i32",
        },
        constexprs={"NVFP4": format == "nvfp4", "ROUNDING": rounding, "B": _VALUES // block, "V": block},
        options=_OPTIONS,
        unaligned=("blocks", "across"),
    )
    for format, block in BLOCKS.items()
    for rounding in (SCALE_ROUNDINGS if format == "mxfp4" else ("floor",))
    for name in (("bf16", "fp32") if rounding == "floor" else ("bf16",))
]  # fmt: skip
