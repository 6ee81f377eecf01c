"""Triton kernel for products of floats and int8 weights: weight-only forward, and the backward of int8_linear.

Not yet run on a GPU: compiled and interpreted only. The codes are widened in registers and the product runs on the
matrix units in the dtype of the floats (codes are exact there), with float32 sums; float32 inputs are multiplied in
full precision. The scales belong to the outputs in the forward, and to the inner dimension in the backward.

M: rows. N: outputs. K: inner dimension of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import CUDA_TARGETS, INTERPRET, AotCase, on_hip
from eff_kernels.ops.int8_linear.args import BackwardArgs


@triton.jit
def swizzle(m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Rows and outputs of this program: wrapped, for loads without a mask, and as they are, for the mask of the store.

    Programs are numbered so that GROUP blocks of rows pass over the outputs together and find the weight in the cache.
    """
    across, down = tl.cdiv(n, BN), tl.cdiv(m, BM)
    group = tl.program_id(0) // (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * across)
    row_M = (group * GROUP + inside % height) * BM + tl.arange(0, BM)
    column_N = (inside // height) * BN + tl.arange(0, BN)
    return row_M % m, column_N % n, row_M, column_N


@triton.jit
def store(out_ptr, out_MN, row_M, column_N, m, n):
    """Write the block in the dtype of the result, as far as it lies in [m, n]."""
    offset_MN = row_M.to(tl.int64)[:, None] * n + column_N[None, :]
    mask_MN = (row_M < m)[:, None] & (column_N < n)[None, :]
    tl.store(out_ptr + offset_MN, out_MN.to(out_ptr.dtype.element_ty), mask_MN)


@triton.jit
def _float_kernel(
    x_ptr, x_stride, weight_ptr, weight_stride_n, weight_stride_k, absmax_ptr, bias_ptr, out_ptr, m, n, k,
    BACKWARD: tl.constexpr, BIAS: tl.constexpr, WIDEN: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_M, column_N, row, column = swizzle(m, n, BM, BN, GROUP)
    x_M = x_ptr + row_M.to(tl.int64) * x_stride
    weight_N = weight_ptr + column_N.to(tl.int64) * weight_stride_n
    sums_MN = tl.zeros([BM, BN], tl.float32)
    for first in range(0, k, BK):
        inner_K = first + tl.arange(0, BK)
        weight_KN = weight_N[None, :] + inner_K.to(tl.int64)[:, None] * weight_stride_k
        if EVEN:
            x_MK = tl.load(x_M[:, None] + inner_K[None, :])
            codes_KN = tl.load(weight_KN)
        else:
            x_MK = tl.load(x_M[:, None] + inner_K[None, :], (inner_K < k)[None, :], other=0.0)
            codes_KN = tl.load(weight_KN, (inner_K < k)[:, None], other=0)
        if WIDEN:
            x_MK = x_MK.to(tl.float32)
        if BACKWARD:
            scale_K = tl.load(absmax_ptr + inner_K, inner_K < k, other=0.0) / 127.0
            x_MK = (x_MK.to(tl.float32) * scale_K[None, :]).to(x_MK.dtype)
        sums_MN = tl.dot(x_MK, codes_KN.to(x_MK.dtype), sums_MN, input_precision="ieee")
    if not BACKWARD:
        sums_MN *= (tl.load(absmax_ptr + column_N) / 127.0)[None, :]
    if BIAS:
        sums_MN += tl.load(bias_ptr + column_N).to(tl.float32)[None, :]
    store(out_ptr, sums_MN, row, column, m, n)


def forward(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write x [M, K] @ dequantised weight [N, K]^T + bias into ``out``."""
    weight = weight.contiguous()
    return _launch(x, weight, weight.stride(), absmax, bias, out, backward=False)


def reject_backward(*args: *BackwardArgs) -> str | None:
    """Why the kernel cannot run this call."""
    grad, *_, dtype = args
    if grad.dtype == torch.float64 or dtype == torch.float64:
        return "sums in float32, got float64"
    return None


def backward(*args: *BackwardArgs) -> Tensor:
    """Gradient [M, K]: grad [M, N] @ dequantised weight [N, K]."""
    grad, weight, absmax, dtype = args
    weight = weight.contiguous()
    out = grad.new_empty(grad.size(0), weight.size(1), dtype=dtype)
    if grad.numel() == 0 or out.numel() == 0:
        return out.zero_()
    return _launch(grad, weight, weight.stride()[::-1], absmax, None, out, backward=True)


def _launch(
    x: Tensor, weight: Tensor, strides: tuple[int, ...], absmax: Tensor, bias: Tensor | None, out: Tensor, *,
    backward: bool,
) -> Tensor:  # fmt: skip
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, n), k = out.shape, x.size(1)
    config = _config(m, x.dtype, hip=on_hip())
    grid = (triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"]),)
    absmax = absmax.contiguous()
    _float_kernel[grid](
        x, x.stride(0), weight, *strides, absmax, absmax if bias is None else bias.contiguous(), out, m, n, k,
        BACKWARD=backward, BIAS=bias is not None, WIDEN=INTERPRET, EVEN=k % config["BK"] == 0, **config,
    )  # fmt: skip
    return out


def _config(m: int, dtype: torch.dtype, *, hip: bool) -> dict[str, int]:
    stages = 2 if hip else 3
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "BK": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    if m <= 16:
        return {"BM": 16, "BN": 32, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": stages}
    if m <= 64:
        return {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": stages}
    return {"BM": 128, "BN": 128, "BK": 32 if hip else 64, "GROUP": 8, "num_warps": 8, "num_stages": stages}


def _aot_cases() -> list[AotCase]:
    cases = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for m in (1, 64, 512) if dtype != torch.float32 else (64,):
            for is_backward in (False, True):
                for targets, hip in ((CUDA_TARGETS, False), (("gfx942",), True)):
                    config: dict[str, Any] = _config(m, dtype, hip=hip)
                    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
                    strides = ("weight_stride_k", "weight_stride_n")[:: -1 if is_backward else 1]
                    cases.append(
                        AotCase(
                            name=f"{'backward' if is_backward else 'weight-only'}-{name}-m{m}-{targets[0][:2]}",
                            kernel=_float_kernel,
                            signature={
                                "x_ptr": f"*{name}", "x_stride": "i32", "weight_ptr": "*i8", strides[1]: "i32",
                                "absmax_ptr": "*fp32", "bias_ptr": f"*{name}", "out_ptr": f"*{name}", "m": "i32",
                                "n": "i32", "k": "i32",
                            },
                            constexprs={
                                strides[0]: 1, "BACKWARD": is_backward, "BIAS": not is_backward, "WIDEN": False,
                                "EVEN": True, **config,
                            },
                            options=options,
                            mma=None if dtype == torch.float32 else "any",
                            targets=targets,
                            unaligned=("m",),
                        )
                    )  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
