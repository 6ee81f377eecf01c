"""Triton kernels of fp8_linear. Not yet run on a GPU: compiled and interpreted only.

Where both sides are FP8 and the matrix units multiply that (sm_89 and later), one kernel hands them the codes as they
are. Everywhere else, and where x is no FP8, the codes are widened in registers by their bits and the product runs in
the dtype of x. That serves sm_80, where Triton refuses E4M3, and gfx942, whose own FP8 has another bias. Sums are
float32.

M: rows. N: outputs. K: inner dimension of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import CUDA_TARGETS, INTERPRET, AotCase, on_hip
from eff_kernels.ops.fp8_linear.args import Args, BackwardArgs
from eff_kernels.ops.fp8_quantize.triton import DTYPES, quantize
from eff_kernels.ops.int8_linear.triton_float import store, swizzle


@triton.jit
def decode(codes, E5M2: tl.constexpr):
    """Bytes as float16: E5M2 exactly, E4M3 as 2^-8 of its value, which is exact too."""
    bits = codes.to(tl.uint16)
    if E5M2:
        bits = bits << 8
    else:
        nan = (bits & 0x7F) == 0x7F
        bits = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8) | tl.where(nan, 0x7E00, 0).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def _fp8_linear_kernel(
    x_ptr, x_stride, row_scale_ptr, weight_ptr, weight_stride_n, weight_stride_k, scale_ptr, bias_ptr, out_ptr, m, n, k,
    DYNAMIC: tl.constexpr, NATIVE: tl.constexpr, E5M2: tl.constexpr, BACKWARD: tl.constexpr, BIAS: tl.constexpr,
    WIDEN: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_M, column_N, row, column = swizzle(m, n, BM, BN, GROUP)
    x_M = x_ptr + row_M.to(tl.int64) * x_stride
    weight_N = weight_ptr + column_N.to(tl.int64) * weight_stride_n
    unit: tl.constexpr = 1.0 if E5M2 or NATIVE else 256.0
    sums_MN = tl.zeros([BM, BN], tl.float32)
    for first in range(0, k, BK):
        inner_K = first + tl.arange(0, BK)
        weight_KN = weight_N[None, :] + inner_K.to(tl.int64)[:, None] * weight_stride_k
        if EVEN:
            x_MK = tl.load(x_M[:, None] + inner_K[None, :])
            codes_KN = tl.load(weight_KN)
        else:
            x_MK = tl.load(x_M[:, None] + inner_K[None, :], (inner_K < k)[None, :], other=0)
            codes_KN = tl.load(weight_KN, (inner_K < k)[:, None], other=0)
        if NATIVE:
            format: tl.constexpr = tl.float8e5 if E5M2 else tl.float8e4nv
            sums_MN = tl.dot(x_MK.to(format, bitcast=True), codes_KN.to(format, bitcast=True), sums_MN)
        else:
            if DYNAMIC:
                x_MK = decode(x_MK, E5M2)
            w_KN = decode(codes_KN, E5M2)
            if WIDEN:
                x_MK = x_MK.to(tl.float32)
            if BACKWARD:
                scale_K = tl.load(scale_ptr + inner_K, inner_K < k, other=0.0) * unit
                x_MK = (x_MK.to(tl.float32) * scale_K[None, :]).to(x_MK.dtype)
            sums_MN = tl.dot(x_MK, w_KN.to(x_MK.dtype), sums_MN, input_precision="ieee")
    if not BACKWARD:
        if DYNAMIC:
            sums_MN *= (tl.load(row_scale_ptr + row_M) * unit)[:, None]
        sums_MN *= (tl.load(scale_ptr + column_N) * unit)[None, :]
    if BIAS:
        sums_MN += tl.load(bias_ptr + column_N).to(tl.float32)[None, :]
    store(out_ptr, sums_MN, row, column, m, n)


def reject(*args: *Args) -> str | None:
    x, *_, out_dtype = args
    if x.dtype not in DTYPES or out_dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype} in and {out_dtype} out"
    return None


def fp8_linear(*args: *Args) -> Tensor:
    """As the reference."""
    x, weight, scale, bias, activations, out_dtype = args
    out = x.new_empty(x.size(0), weight.size(0), dtype=out_dtype)
    if out.numel() == 0:
        return out
    row_scale = None
    if activations == "dynamic":
        x, row_scale = quantize(x, weight.dtype, False)
    weight = weight.contiguous()
    return _launch(x, row_scale, weight, weight.stride(), scale, bias, out, backward=False)


def reject_backward(*args: *BackwardArgs) -> str | None:
    grad, *_, dtype = args
    if grad.dtype == torch.float64 or dtype == torch.float64:
        return "sums in float32, got float64"
    return None


def backward(*args: *BackwardArgs) -> Tensor:
    """Gradient [M, K]: grad [M, N] @ dequantised weight [N, K]."""
    grad, weight, scale, dtype = args
    weight = weight.contiguous()
    out = grad.new_empty(grad.size(0), weight.size(1), dtype=dtype)
    if grad.numel() == 0 or out.numel() == 0:
        return out.zero_()
    return _launch(grad, None, weight, weight.stride()[::-1], scale, None, out, backward=True)


def _launch(
    x: Tensor, row_scale: Tensor | None, weight: Tensor, strides: tuple[int, ...], scale: Tensor, bias: Tensor | None,
    out: Tensor, *, backward: bool,
) -> Tensor:  # fmt: skip
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, n), k = out.shape, x.size(1)
    native = row_scale is not None and not INTERPRET and _multiplies_fp8(x.device)
    config = _config(m, x.dtype, hip=on_hip())
    grid = (triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"]),)
    scale = scale.contiguous()
    _fp8_linear_kernel[grid](
        x, x.stride(0), scale if row_scale is None else row_scale, weight.view(torch.uint8), *strides, scale,
        scale if bias is None else bias.contiguous(), out, m, n, k, DYNAMIC=row_scale is not None, NATIVE=native,
        E5M2=weight.dtype == torch.float8_e5m2, BACKWARD=backward, BIAS=bias is not None, WIDEN=INTERPRET,
        EVEN=k % config["BK"] == 0, **config,
    )  # fmt: skip
    return out


def _multiplies_fp8(device: torch.device) -> bool:
    return not on_hip() and torch.cuda.get_device_capability(device) >= (8, 9)


def _config(m: int, dtype: torch.dtype, *, hip: bool) -> dict[str, int]:
    stages = 2 if hip else 3
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "BK": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    if m <= 16:
        return {"BM": 16, "BN": 32, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": stages}
    if m <= 64:
        return {"BM": 64, "BN": 32, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": stages}
    return {"BM": 128, "BN": 128, "BK": 32 if hip else 64, "GROUP": 8, "num_warps": 8, "num_stages": stages}


def _case(kind: str, name: str, dtype: torch.dtype, m: int, targets: tuple[str, ...], *, e5m2: bool = False) -> AotCase:
    config: dict[str, Any] = _config(m, dtype, hip=targets == ("gfx942",))
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    dynamic, backward = kind in ("native", "dynamic"), kind == "backward"
    strides = ("weight_stride_k", "weight_stride_n")[:: -1 if backward else 1]
    return AotCase(
        name=f"{kind}-{'e5m2' if e5m2 else 'e4m3'}-{name}-m{m}-{targets[0][:2]}",
        kernel=_fp8_linear_kernel,
        signature={
            "x_ptr": "*u8" if dynamic else f"*{name}", "x_stride": "i32", "row_scale_ptr": "*fp32",
            "weight_ptr": "*u8", strides[1]: "i32", "scale_ptr": "*fp32", "bias_ptr": f"*{name}", "out_ptr": f"*{name}",
            "m": "i32", "n": "i32", "k": "i32",
        },
        constexprs={
            strides[0]: 1, "DYNAMIC": dynamic, "NATIVE": kind == "native", "E5M2": e5m2, "BACKWARD": backward,
            "BIAS": not backward, "WIDEN": False, "EVEN": True, **config,
        },
        options=options,
        mma=None if dtype == torch.float32 else "any",
        targets=targets,
        unaligned=("m",),
    )  # fmt: skip


AOT_CASES = [
    *(
        _case(kind, "bf16", torch.bfloat16, m, targets)
        for kind in ("none", "backward")
        for m in (1, 64, 512)
        for targets in (CUDA_TARGETS, ("gfx942",))
    ),
    *(_case("dynamic", "bf16", torch.bfloat16, m, targets) for m in (1, 512) for targets in (("sm_80",), ("gfx942",))),
    *(_case("native", "bf16", torch.bfloat16, m, ("sm_90", "sm_100")) for m in (1, 64, 512)),
    *(_case(kind, "bf16", torch.bfloat16, 64, ("sm_90",), e5m2=True) for kind in ("none", "native")),
    _case("none", "fp16", torch.float16, 64, ("sm_80",)),
    _case("none", "fp32", torch.float32, 64, ("sm_80",)),
]
