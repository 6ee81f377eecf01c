"""Triton kernel of int8_linear. Not yet run on a GPU: compiled and interpreted only.

The rows are quantised by the kernels of int8_quantize. One kernel then does the integer product on the matrix units
and, before anything is written, the outlier columns in floating point, both scales and the bias. How many outlier
columns there are stays on the device: nothing waits for the host.

M: rows. N: outputs. K: inputs of a block. C: outlier columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import CUDA_TARGETS, INTERPRET, AotCase, on_hip
from eff_kernels.ops.int8_linear import triton_float
from eff_kernels.ops.int8_linear.args import Args
from eff_kernels.ops.int8_linear.common import LARGEST_PRODUCT, overflow
from eff_kernels.ops.int8_quantize.triton import DTYPES, quantize_for_product

_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_COLUMNS = 16  # outlier columns of a block


@triton.jit
def _exact_sums(
    codes_M, weight_N, begin, end, k, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Sums of products over the columns from ``begin`` to ``end``: whole blocks, but for the end of the row."""
    inner_K = tl.arange(0, BK)
    sums_MN = tl.zeros([BM, BN], tl.int32)
    for first in range(begin, end, BK):
        if EVEN:
            codes_MK = tl.load(codes_M[:, None] + (first + inner_K)[None, :])
            weight_KN = tl.load(weight_N[None, :] + (first + inner_K)[:, None])
        else:
            inside_K = first + inner_K < k
            codes_MK = tl.load(codes_M[:, None] + (first + inner_K)[None, :], inside_K[None, :], other=0)
            weight_KN = tl.load(weight_N[None, :] + (first + inner_K)[:, None], inside_K[:, None], other=0)
        sums_MN = tl.dot(codes_MK, weight_KN, sums_MN, out_dtype=tl.int32)
    return sums_MN


@triton.jit
def products(
    codes_M, rowmax_ptr, row_M, weight_N, x_M, columns_ptr, count_ptr, threshold, k, group,
    GROUPED: tl.constexpr, OUTLIERS: tl.constexpr, PER_TOKEN: tl.constexpr, WIDEN: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A block of products in float32, to be multiplied by the scales of the outputs.

    ``codes_M``, ``weight_N`` and ``x_M`` point at the starts of rows; ``row_M`` counts the rows of ``rowmax_ptr``.
    """
    if GROUPED:
        out_MN = tl.zeros([BM, BN], tl.float32)
        groups = tl.cdiv(k, group)
        for g in range(groups):
            sums_MN = _exact_sums(codes_M, weight_N, g * group, tl.minimum(k, (g + 1) * group), k, EVEN, BM, BN, BK)
            rowmax_M = tl.load(rowmax_ptr + row_M * groups + g)
            out_MN += sums_MN.to(tl.float32) * (rowmax_M / 127.0)[:, None]
    else:
        sums_MN = _exact_sums(codes_M, weight_N, 0, k, k, EVEN, BM, BN, BK)
        out_MN = sums_MN.to(tl.float32) * (tl.load(rowmax_ptr + row_M) / 127.0)[:, None]
    if OUTLIERS:
        outlier_MN = tl.zeros([BM, BN], tl.float32)
        count = tl.load(count_ptr)
        for first in range(0, count, BC):
            number_C = first + tl.arange(0, BC)
            column_C = tl.load(columns_ptr + number_C, number_C < count, other=0)
            x_MC = tl.load(x_M[:, None] + column_C[None, :], (number_C < count)[None, :], other=0.0)
            if WIDEN:
                x_MC = x_MC.to(tl.float32)
            if PER_TOKEN:
                x_MC = tl.where(tl.abs(x_MC.to(tl.float32)) >= threshold, x_MC, 0.0).to(x_MC.dtype)
            weight_CN = tl.load(weight_N[None, :] + column_C[:, None], (number_C < count)[:, None], other=0)
            outlier_MN = tl.dot(x_MC, weight_CN.to(x_MC.dtype), outlier_MN, input_precision="ieee")
        out_MN += outlier_MN
    return out_MN


@triton.jit
def _int8_linear_kernel(
    codes_ptr, rowmax_ptr, weight_ptr, absmax_ptr, bias_ptr, x_ptr, x_stride, columns_ptr, out_ptr, threshold, m, n, k,
    group, GROUPED: tl.constexpr, BIAS: tl.constexpr, OUTLIERS: tl.constexpr, PER_TOKEN: tl.constexpr,
    WIDEN: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_M, column_N, row, column = triton_float.swizzle(m, n, BM, BN, GROUP)
    codes_M = codes_ptr + row_M.to(tl.int64) * k
    weight_N = weight_ptr + column_N.to(tl.int64) * k
    x_M = x_ptr + row_M.to(tl.int64) * x_stride
    out_MN = products(
        codes_M, rowmax_ptr, row_M, weight_N, x_M, columns_ptr, columns_ptr + k, threshold, k, group,
        GROUPED, OUTLIERS, PER_TOKEN, WIDEN, EVEN, BM, BN, BK, BC,
    )  # fmt: skip
    out_MN *= (tl.load(absmax_ptr + column_N) / 127.0)[None, :]
    if BIAS:
        out_MN += tl.load(bias_ptr + column_N).to(tl.float32)[None, :]
    triton_float.store(out_ptr, out_MN, row, column, m, n)


def reject(*args: *Args) -> str | None:
    x, _, _, bias, *_, activation, activation_group, out_dtype = args
    if x.dtype not in DTYPES or out_dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype} in and {out_dtype} out"
    if activation == "dynamic" and (reason := overflow(activation_group or x.size(1), LARGEST_PRODUCT)):
        return f"{reason}; use activation_group"
    if bias is not None and bias.dtype not in DTYPES:
        return f"takes a bias of float32, bfloat16 or float16, got {bias.dtype}"
    return None


def run(*args: *Args) -> Tensor:
    """As the reference."""
    x, weight, absmax, bias, threshold, per_token_outliers, activation, activation_group, out_dtype = args
    (m, k), n = x.shape, weight.size(0)
    out = x.new_empty(m, n, dtype=out_dtype)
    if out.numel() == 0:
        return out
    if activation == "none":
        return triton_float.forward(x, weight, absmax, bias, out)
    x = x if x.stride(1) == 1 else x.contiguous()
    codes, rowmax, columns = quantize_for_product(x, threshold, per_token_outliers, activation_group)
    config = _config(m, n, activation_group, hip=on_hip())
    grid = (triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"]),)
    absmax = absmax.contiguous()
    _int8_linear_kernel[grid](
        codes, rowmax, weight.contiguous(), absmax, absmax if bias is None else bias.contiguous(), x, x.stride(0),
        codes if columns is None else columns, out, threshold, m, n, k, activation_group or k,
        GROUPED=activation_group is not None, BIAS=bias is not None, OUTLIERS=columns is not None,
        PER_TOKEN=per_token_outliers, WIDEN=INTERPRET, EVEN=k % config["BK"] == 0,
        **config,
    )  # fmt: skip
    return out


def _config(m: int, n: int, group: int | None, *, hip: bool) -> dict[str, int]:
    """Blocks for the shape: few rows are bound by reading the weight, so there the programs must be many.

    No block of inputs reaches into the next group.
    """
    stages = 2 if hip else 4
    if m <= 16:
        block = {"BM": 16, "BN": 16 if n < 4096 else 32, "BK": 256, "num_warps": 4}
    elif m <= 64:
        block = {"BM": 64, "BN": 32, "BK": 128, "num_warps": 4}
    else:
        block = {"BM": 128, "BN": 128 if group is None else 64, "BK": 64 if hip else 128, "num_warps": 8}
        stages = 2 if hip else 3
    while group is not None and group % block["BK"]:
        block["BK"] //= 2
    return {**block, "BC": _COLUMNS, "GROUP": 8, "num_stages": stages}


def _aot_cases() -> list[AotCase]:
    cases = []
    shapes = ((1, 2048, None), (16, 4096, None), (64, 4096, None), (512, 4096, None), (1, 2048, 128), (512, 4096, 32))
    for m, n, group in shapes:
        for dtype, outliers in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)):
            name = _TRITON_NAMES[dtype]
            for targets, hip in ((CUDA_TARGETS, False), (("gfx942",), True)):
                config = _config(m, n, group, hip=hip)
                options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
                pointers = {
                    "codes_ptr": "*i8", "rowmax_ptr": "*fp32", "weight_ptr": "*i8", "absmax_ptr": "*fp32",
                    "bias_ptr": f"*{name}", "x_ptr": f"*{name}", "x_stride": "i32", "columns_ptr": "*i32",
                    "out_ptr": f"*{name}", "threshold": "fp32", "m": "i32", "n": "i32", "k": "i32",
                    "group": "i32",
                }  # fmt: skip
                cases.append(
                    AotCase(
                        name=f"{name}-m{m}-n{n}-g{group}-{'outliers' if outliers else 'plain'}-{targets[0][:2]}",
                        kernel=_int8_linear_kernel,
                        signature=pointers,
                        constexprs={
                            "GROUPED": group is not None, "BIAS": True, "OUTLIERS": outliers, "PER_TOKEN": outliers,
                            "WIDEN": False, "EVEN": True,
                            **config,
                        },
                        options=options,
                        mma="int8",
                        targets=targets,
                        unaligned=("m",),
                    )
                )  # fmt: skip
    return cases


AOT_CASES = [*_aot_cases(), *triton_float.AOT_CASES]
