"""Triton kernels of int4_linear and int8_static_linear. Not yet run on a GPU: compiled and interpreted only.

One kernel quantises the rows of x. For packed weights it puts the codes of even columns before those of the odd ones:
the kernel of the product then unpacks a block of bytes by two shifts and multiplies its halves on the int8 matrix
units, each with a block of codes of its own.

R: rows of a program. C: columns of a block. M: rows. N: outputs. K: bytes of a block of the weight's rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import CUDA_TARGETS, AotCase, on_hip
from eff_kernels.ops.int4_linear.args import Args
from eff_kernels.ops.int8_linear.common import overflow
from eff_kernels.ops.int8_linear.triton_float import store, swizzle
from eff_kernels.ops.int8_quantize import triton as int8_triton
from eff_kernels.ops.int8_quantize.triton import DTYPES

_ROUND = tl.constexpr(12582912.0)  # as in int8_quantize
_OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _codes_kernel(
    x_ptr, x_stride, step_ptr, factor_ptr, codes_ptr, rows, k,
    STATIC: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    bad_R = tl.zeros([R], tl.int32)
    if STATIC:
        scale_R = tl.full([R], 1.0, tl.float32)
        factor_R = scale_R
    else:
        bits_R = int8_triton._row_bits(x_ptr, x_stride, 0.0, codes_ptr, row_R, rows, k, k, 1, False, R, C)
        absmax_R = int8_triton._finish(bits_R)
        scale_R = int8_triton._scale(absmax_R)
        factor_R = absmax_R / 127.0
    for first in range(0, k, C):
        column_C = first + tl.arange(0, C)
        mask_RC = (row_R < rows)[:, None] & (column_C < k)[None, :]
        x_RC = tl.load(x_ptr + (row_R * x_stride)[:, None] + column_C[None, :], mask_RC, other=0.0).to(tl.float32)
        if STATIC:
            step_RC = tl.load(step_ptr + column_C, column_C < k, other=1.0)[None, :] + tl.zeros([R, C], tl.float32)
            x_RC = tl.div_rn(x_RC, step_RC)
            finite_RC = tl.abs(x_RC) < float("inf")
            bad_R = tl.maximum(bad_R, tl.max((~finite_RC).to(tl.int32), 1))
            clamped_RC = tl.minimum(tl.maximum(tl.where(finite_RC, x_RC, 0.0), -128.0), 127.0)
            codes_RC = ((clamped_RC + _ROUND) - _ROUND).to(tl.int8)
        else:
            codes_RC = int8_triton._encode(x_RC, scale_R[:, None], False)
        place_C = column_C
        if SPLIT:
            place_C = column_C // 2 + column_C % 2 * (k // 2)
        tl.store(codes_ptr + (row_R * k)[:, None] + place_C[None, :], codes_RC, mask_RC)
    tl.store(factor_ptr + row_R, tl.where(bad_R > 0, float("nan"), factor_R), row_R < rows)


@triton.jit
def _product_kernel(
    codes_ptr, factor_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, m, n, length,
    PACKED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_M, column_N, row, column = swizzle(m, n, BM, BN, GROUP)
    codes_M = codes_ptr + row_M.to(tl.int64) * (length * (2 if PACKED else 1))
    weight_N = weight_ptr + column_N.to(tl.int64) * length
    sums_MN = tl.zeros([BM, BN], tl.int32)
    for first in range(0, length, BK):
        inner_K = first + tl.arange(0, BK)
        codes_MK = codes_M[:, None] + inner_K[None, :]
        weight_KN = weight_N[None, :] + inner_K[:, None]
        if EVEN:
            even_MK = tl.load(codes_MK)
            bytes_KN = tl.load(weight_KN)
        else:
            even_MK = tl.load(codes_MK, (inner_K < length)[None, :], other=0)
            bytes_KN = tl.load(weight_KN, (inner_K < length)[:, None], other=0)
        if PACKED:
            if EVEN:
                odd_MK = tl.load(codes_MK + length)
            else:
                odd_MK = tl.load(codes_MK + length, (inner_K < length)[None, :], other=0)
            # The sign of a half comes from shifting it down from the upper end of the byte.
            low_KN = (bytes_KN << 4).to(tl.int8, bitcast=True) >> 4
            high_KN = bytes_KN.to(tl.int8, bitcast=True) >> 4
            sums_MN = tl.dot(even_MK, low_KN, sums_MN, out_dtype=tl.int32)
            sums_MN = tl.dot(odd_MK, high_KN, sums_MN, out_dtype=tl.int32)
        else:
            sums_MN = tl.dot(even_MK, bytes_KN, sums_MN, out_dtype=tl.int32)
    out_MN = sums_MN.to(tl.float32) * tl.load(factor_ptr + row_M)[:, None] * tl.load(scale_ptr + column_N)[None, :]
    if BIAS:
        out_MN += tl.load(bias_ptr + column_N).to(tl.float32)[None, :]
    store(out_ptr, out_MN, row, column, m, n)


def reject(*args: *Args) -> str | None:
    x, weight, _, bias, _, out_dtype = args
    if x.dtype not in DTYPES or out_dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype} in and {out_dtype} out"
    if reason := overflow(x.size(1), 128 * (8 if weight.dtype is torch.uint8 else 128)):
        return reason
    if bias is not None and bias.dtype not in DTYPES:
        return f"takes a bias of float32, bfloat16 or float16, got {bias.dtype}"
    return None


def run(*args: *Args) -> Tensor:
    """As the reference."""
    x, weight, scale, bias, input_scale, out_dtype = args
    (m, k), (n, length) = x.shape, weight.shape
    out = x.new_empty(m, n, dtype=out_dtype)
    if out.numel() == 0:
        return out
    packed, hip = weight.dtype is torch.uint8, on_hip()
    x = x if x.stride(1) == 1 else x.contiguous()
    codes, factor = x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    block = int8_triton._row_block(k)
    _codes_kernel[(triton.cdiv(m, block["R"]),)](
        x, x.stride(0), factor if input_scale is None else input_scale.contiguous(), factor, codes, m, k,
        STATIC=input_scale is not None, SPLIT=packed, **block, **_OPTIONS,
    )  # fmt: skip
    config = _config(m, n, hip=hip)
    scale = scale.contiguous()
    _product_kernel[(triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"]),)](
        codes, factor, weight.contiguous(), scale, scale if bias is None else bias.contiguous(), out, m, n, length,
        PACKED=packed, BIAS=bias is not None, EVEN=length % config["BK"] == 0, **config,
    )  # fmt: skip
    return out


def _config(m: int, n: int, *, hip: bool) -> dict[str, int]:
    """Blocks for the shape: few rows are bound by reading the weight, so there the programs must be many."""
    stages = 2 if hip else 3
    if m <= 16:
        block = {"BM": 16, "BN": 16 if n < 4096 else 32, "BK": 128, "num_warps": 4}
    elif m <= 64:
        block = {"BM": 64, "BN": 32, "BK": 64, "num_warps": 4}
    else:
        block = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8}
    return {**block, "GROUP": 8, "num_stages": stages}


def _aot_cases() -> list[AotCase]:
    cases = [
        AotCase(
            name=f"codes-{dtype}-{'static' if static else 'dynamic'}",
            kernel=_codes_kernel,
            signature={
                "x_ptr": f"*{dtype}", "x_stride": "i32", "step_ptr": "*fp32", "factor_ptr": "*fp32",
                "codes_ptr": "*i8", "rows": "i32", "k": "i32",
            },
            constexprs={"STATIC": static, "SPLIT": True, **int8_triton._row_block(4096)},
            options=_OPTIONS,
        )
        for dtype, static in (("bf16", False), ("bf16", True), ("fp32", True))
    ]  # fmt: skip
    for m, n, packed in ((1, 2048, True), (16, 4096, True), (64, 4096, True), (512, 4096, True), (512, 4096, False)):
        for targets, hip in ((CUDA_TARGETS, False), (("gfx942",), True)):
            config: dict[str, Any] = _config(m, n, hip=hip)
            options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
            cases.append(
                AotCase(
                    name=f"product-m{m}-n{n}-{'packed' if packed else 'int8'}-{'hip' if hip else 'cuda'}",
                    kernel=_product_kernel,
                    signature={
                        "codes_ptr": "*i8", "factor_ptr": "*fp32", "weight_ptr": "*u8" if packed else "*i8",
                        "scale_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "m": "i32", "n": "i32",
                        "length": "i32",
                    },
                    constexprs={"PACKED": packed, "BIAS": True, "EVEN": True, **config},
                    options=options,
                    mma="int8",
                    targets=targets,
                    unaligned=("m",),
                )
            )  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
