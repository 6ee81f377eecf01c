"""Triton kernel of fp8_quantize and fp8_round. Not yet run on a GPU: compiled and interpreted only.

A row is read twice, the second time from the cache. Rounding works on the bits of float32, as in the compiled CPU code,
because GPUs before sm_89 and the interpreter have no such conversion; so all backends give the same bytes.

R: rows of a program. C: columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import AotCase
from eff_kernels.ops.fp8_quantize.args import Args
from eff_kernels.ops.fp8_quantize.common import EPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 4096  # elements of a block
_EPS = tl.constexpr(EPS)
_INFINITY = tl.constexpr(0x7F800000)
_OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _round(x, E5M2: tl.constexpr, VALUES: tl.constexpr):
    """Codes as int32 of x, whose magnitude is at most the largest number of the format; or the numbers themselves."""
    drop: tl.constexpr = 21 if E5M2 else 20  # bits of the fraction that have no room
    least: tl.constexpr = 2.0**-14 if E5M2 else 2.0**-6  # the smallest normal number
    one: tl.constexpr = 2.0**7 if E5M2 else 2.0**14  # added to a smaller one, the sum is rounded as it must be
    one_bits: tl.constexpr = 0x43000000 if E5M2 else 0x46800000
    bias: tl.constexpr = 112 << 2 if E5M2 else 120 << 3
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    if VALUES:
        value = tl.where(magnitude < least, (magnitude + one) - one, (normal << drop).to(tl.float32, bitcast=True))
        result = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        subnormal = (magnitude + one).to(tl.int32, bitcast=True) - one_bits
        result = tl.where(magnitude < least, subnormal, normal - bias) | ((sign >> 24) & 0x80)
    return result


@triton.jit
def _fp8_quantize_kernel(
    x_ptr, x_stride, out_ptr, scale_ptr, rows, k,
    E5M2: tl.constexpr, VALUES: tl.constexpr, POWER_OF_TWO: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    most: tl.constexpr = 57344.0 if E5M2 else 448.0
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    # Magnitudes are compared as integers: the order is the same, and NaN comes above infinity and is never lost.
    bits_R = tl.zeros([R], tl.int32)
    for first in range(0, k, C):
        column_C = first + tl.arange(0, C)
        mask_RC = (row_R < rows)[:, None] & (column_C < k)[None, :]
        x_RC = tl.load(x_ptr + row_R[:, None] * x_stride + column_C[None, :], mask_RC, other=0.0).to(tl.float32)
        bits_R = tl.maximum(bits_R, tl.max(x_RC.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    good_R = bits_R < _INFINITY
    amax_R = tl.where(good_R, bits_R, 0).to(tl.float32, bitcast=True)
    scale_R = tl.div_rn(tl.maximum(amax_R, _EPS), tl.full([R], most, tl.float32))
    if POWER_OF_TWO:
        scale_R = ((scale_R.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    if not VALUES:
        tl.store(scale_ptr + row_R, tl.where(good_R, scale_R, float("nan")), row_R < rows)
    for first in range(0, k, C):
        column_C = first + tl.arange(0, C)
        mask_RC = (row_R < rows)[:, None] & (column_C < k)[None, :]
        x_RC = tl.load(x_ptr + row_R[:, None] * x_stride + column_C[None, :], mask_RC, other=0.0).to(tl.float32)
        x_RC = tl.where(good_R[:, None], x_RC, 0.0)
        scaled_RC = tl.div_rn(x_RC, tl.broadcast_to(scale_R[:, None], x_RC.shape))
        scaled_RC = tl.minimum(tl.maximum(scaled_RC, -most), most)
        out_RC = _round(scaled_RC, E5M2, VALUES)
        if VALUES:
            out_RC = tl.where(good_R[:, None], out_RC * scale_R[:, None], float("nan"))
        else:
            out_RC = tl.where(good_R[:, None], out_RC, 0x7F)
        tl.store(out_ptr + row_R[:, None] * k + column_C[None, :], out_RC.to(out_ptr.dtype.element_ty), mask_RC)


def reject(*args: *Args) -> str | None:
    x, *_ = args
    return None if x.dtype in DTYPES else f"takes float32, bfloat16 and float16, got {x.dtype}"


def quantize(*args: *Args) -> tuple[Tensor, Tensor]:
    """As the reference."""
    x, dtype, power_of_two = args
    codes, scale = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.size(0), dtype=torch.float32)
    _launch(x, codes, scale, dtype, power_of_two, values=False)
    return codes, scale


def round_rows(*args: *Args) -> Tensor:
    """As the reference."""
    x, dtype, power_of_two = args
    out = x.new_empty(x.shape)
    _launch(x, out, out, dtype, power_of_two, values=True)
    return out


def _launch(x: Tensor, out: Tensor, scale: Tensor, dtype: torch.dtype, power_of_two: bool, *, values: bool) -> None:
    rows, k = x.shape
    if rows == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    block = _row_block(k)
    _fp8_quantize_kernel[(triton.cdiv(rows, block["R"]),)](
        x, x.stride(0), out, scale, rows, k, E5M2=dtype == torch.float8_e5m2, VALUES=values, POWER_OF_TWO=power_of_two,
        **block, **_OPTIONS,
    )  # fmt: skip


def _row_block(k: int) -> dict[str, int]:
    width = min(max(triton.next_power_of_2(k), 16), _BLOCK)
    return {"R": max(1, 2048 // width), "C": width}


AOT_CASES = [
    AotCase(
        name=f"{name}-{'e5m2' if e5m2 else 'e4m3'}-{'values' if values else 'codes'}",
        kernel=_fp8_quantize_kernel,
        signature={
            "x_ptr": f"*{name}", "x_stride": "i32", "out_ptr": f"*{name}" if values else "*u8",
            "scale_ptr": f"*{name}" if values else "*fp32", "rows": "i32", "k": "i32",
        },
        constexprs={"E5M2": e5m2, "VALUES": values, "POWER_OF_TWO": e5m2, **_row_block(4096)},
        options=_OPTIONS,
    )
    for name, e5m2 in (("bf16", False), ("bf16", True), ("fp32", False))
    for values in (False, True)
]  # fmt: skip
