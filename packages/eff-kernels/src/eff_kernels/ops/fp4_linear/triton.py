"""Triton kernels of fp4_linear and its backward. Not yet run on a GPU: compiled and interpreted only.

Codes are decoded in registers and multiplied by their block scales, which is exact: a code has two significant bits and
an E4M3 scale four, so that bfloat16 and float16 hold the product. Powers of two from mxfp4 may leave the range of
float16; there the product is computed in TF32, which holds float16 and the codes exactly.

Rounded activations (W4A4) go to the matrix units as 4-bit floats where there are such units (sm_100), else as bfloat16.

M: rows. N: outputs. I: inner dimension of a block. In the forward the weight is [N, I], in the backward [I, N].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import CUDA_TARGETS, INTERPRET, AotCase, on_hip
from eff_kernels.ops.fp4_linear.args import Args, BackwardArgs
from eff_kernels.ops.fp4_quantize import reference
from eff_kernels.ops.fp4_quantize import triton as fp4_triton
from eff_kernels.ops.fp4_quantize.common import BLOCKS, global_scale_of
from eff_kernels.ops.int8_linear.triton_float import store, swizzle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def decode(packed, scale, V: tl.constexpr, NVFP4: tl.constexpr, DTYPE: tl.constexpr):
    """Values [R, C] of packed codes [R, C / 2] and bytes of block scales [R, C / V]."""
    R: tl.constexpr = packed.shape[0]
    C: tl.constexpr = 2 * packed.shape[1]
    code = tl.reshape(tl.join(packed & 15, packed >> 4), [R, C]).to(tl.int16)
    # The fields of E2M1 in those of float16, whose exponent has another bias.
    value = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    if NVFP4:
        byte = scale.to(tl.int16)
        factor = (((byte & 127) << 7) | ((byte & 128) << 8)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        factor = tl.where((byte & 127) == 127, float("nan"), factor)
    else:
        factor = tl.maximum(scale.to(tl.int32) << 23, 0x400000).to(tl.float32, bitcast=True)
        factor = tl.where(scale == 255, float("nan"), factor)
    scaled = tl.reshape(value, [R, C // V, V]) * factor[:, :, None]
    return tl.reshape(scaled, [R, C]).to(DTYPE)


@triton.jit
def _weight_kernel(
    x_ptr, x_stride, packed_ptr, scale_ptr, global_ptr, input_global_ptr, bias_ptr, out_ptr, m, n, k,
    NVFP4: tl.constexpr, INPUT_GLOBAL: tl.constexpr, BACKWARD: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [m, k] times the weight: [n, k] transposed, or in the backward [k, n] as it is."""
    row_M, _, row, column = swizzle(m, n, BM, BN, GROUP)
    first_column = tl.min(column, 0)
    DTYPE: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    x_M = x_ptr + row_M.to(tl.int64) * x_stride
    sums_MN = tl.zeros([BM, BN], tl.float32)
    for first in range(0, k, BK):
        inner_K = first + tl.arange(0, BK)
        x_MK = tl.load(x_M[:, None] + inner_K[None, :], (inner_K < k)[None, :], other=0.0)
        if WIDE:
            x_MK = x_MK.to(tl.float32)
        if BACKWARD:
            byte_H = first_column // 2 + tl.arange(0, BN // 2)
            block_B = first_column // V + tl.arange(0, BN // V)
            inside_K = (inner_K < k)[:, None]
            line_K = inner_K.to(tl.int64)[:, None]
            packed = tl.load(
                packed_ptr + line_K * (n // 2) + byte_H[None, :], inside_K & (byte_H < n // 2)[None, :], other=0
            )
            scale = tl.load(
                scale_ptr + line_K * (n // V) + block_B[None, :], inside_K & (block_B < n // V)[None, :], other=0
            )
            weight_KN = decode(packed, scale, V, NVFP4, DTYPE)
        else:
            byte_H = first // 2 + tl.arange(0, BK // 2)
            block_B = first // V + tl.arange(0, BK // V)
            inside_N = (column < n)[:, None]
            line_N = column.to(tl.int64)[:, None]
            packed = tl.load(
                packed_ptr + line_N * (k // 2) + byte_H[None, :], inside_N & (byte_H < k // 2)[None, :], other=0
            )
            scale = tl.load(
                scale_ptr + line_N * (k // V) + block_B[None, :], inside_N & (block_B < k // V)[None, :], other=0
            )
            weight_KN = tl.trans(decode(packed, scale, V, NVFP4, DTYPE))
        sums_MN = tl.dot(x_MK, weight_KN, sums_MN, input_precision=PRECISION)
    if NVFP4:
        sums_MN *= tl.load(global_ptr)
    if INPUT_GLOBAL:
        sums_MN *= tl.load(input_global_ptr)
    if BIAS:
        sums_MN += tl.load(bias_ptr + column, column < n, other=0.0).to(tl.float32)[None, :]
    store(out_ptr, sums_MN, row, column, m, n)


@triton.jit
def _codes_kernel(
    x_ptr, x_scale_ptr, packed_ptr, scale_ptr, global_ptr, input_global_ptr, bias_ptr, out_ptr, m, n, k,
    NVFP4: tl.constexpr, BIAS: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Codes of x [m, k / 2] times codes of the weight [n, k / 2], transposed, on units for 4-bit floats."""
    row_M, column_N, row, column = swizzle(m, n, BM, BN, GROUP)
    sums_MN = tl.zeros([BM, BN], tl.float32)
    for first in range(0, k, BK):
        byte_H = first // 2 + tl.arange(0, BK // 2)
        block_B = first // V + tl.arange(0, BK // V)
        line_M, line_N = row_M.to(tl.int64)[:, None], column_N.to(tl.int64)
        x_MH = tl.load(x_ptr + line_M * (k // 2) + byte_H[None, :], (byte_H < k // 2)[None, :], other=0)
        weight_HN = tl.load(
            packed_ptr + line_N[None, :] * (k // 2) + byte_H[:, None], (byte_H < k // 2)[:, None], other=0
        )
        inside_B = (block_B < k // V)[None, :]
        x_scale_MB = tl.load(x_scale_ptr + line_M * (k // V) + block_B[None, :], inside_B, other=0)
        scale_NB = tl.load(scale_ptr + line_N[:, None] * (k // V) + block_B[None, :], inside_B, other=0)
        if NVFP4:
            x_scale_MB = x_scale_MB.to(tl.float8e4nv, bitcast=True)
            scale_NB = scale_NB.to(tl.float8e4nv, bitcast=True)
        sums_MN = tl.dot_scaled(x_MH, x_scale_MB, "e2m1", weight_HN, scale_NB, "e2m1", sums_MN)
    if NVFP4:
        sums_MN *= tl.load(global_ptr) * tl.load(input_global_ptr)
    if BIAS:
        sums_MN += tl.load(bias_ptr + column_N).to(tl.float32)[None, :]
    store(out_ptr, sums_MN, row, column, m, n)


def reject(*args: *Args) -> str | None:
    """Why the kernels cannot run this call."""
    x, *_, out_dtype = args
    if x.dtype not in DTYPES or out_dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {x.dtype} in and {out_dtype} out"
    return None


def run(*args: *Args) -> Tensor:
    """As the reference, summed in float32."""
    x, packed, scale, global_scale, bias, input_global_scale, format, activations, scale_rounding, out_dtype = args
    out = x.new_empty(x.size(0), packed.size(0), dtype=out_dtype)
    if out.numel() == 0:
        return out
    packed, scale = packed.contiguous(), scale.contiguous().view(torch.uint8)
    if activations == "none":
        return _launch(x, packed, scale, global_scale, None, bias, out, format, backward=False)
    if format == "nvfp4" and input_global_scale is None:
        input_global_scale = global_scale_of(x)
    codes, x_scale = fp4_triton.run(x, input_global_scale, format, scale_rounding)
    if _has_fp4_units(x.device, format) and x.size(1):
        return _launch_codes(codes, x_scale, packed, scale, global_scale, input_global_scale, bias, out, format)
    one = None if global_scale is None else torch.ones_like(global_scale)
    x = reference.dequantize(codes, x_scale, one, format, torch.bfloat16)
    return _launch(x, packed, scale, global_scale, input_global_scale, bias, out, format, backward=False)


def reject_backward(*args: *BackwardArgs) -> str | None:
    """Why the kernel cannot run this call."""
    grad, *_, dtype = args
    if grad.dtype not in DTYPES or dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {grad.dtype} in and {dtype} out"
    return None


def backward(*args: *BackwardArgs) -> Tensor:
    """Gradient [M, K]: grad [M, N] @ dequantised weight [N, K]."""
    grad, packed, scale, global_scale, format, dtype = args
    out = grad.new_empty(grad.size(0), 2 * packed.size(1), dtype=dtype)
    if grad.numel() == 0 or out.numel() == 0:
        return out.zero_()
    packed, scale = packed.contiguous(), scale.contiguous().view(torch.uint8)
    return _launch(grad, packed, scale, global_scale, None, None, out, format, backward=True)


def _has_fp4_units(device: torch.device, format: str) -> bool:
    if INTERPRET:
        return format == "mxfp4"  # the interpreter takes every scale for a power of two
    return not on_hip() and torch.cuda.get_device_capability(device)[0] == 10


def _launch(
    x: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor | None, input_global_scale: Tensor | None,
    bias: Tensor | None, out: Tensor, format: str, *, backward: bool,
) -> Tensor:  # fmt: skip
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, n), k = out.shape, x.size(1)
    config = _config(m, x.dtype, format, hip=on_hip())
    grid = (triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"]),)
    _weight_kernel[grid](
        x, x.stride(0), packed, scale, _or(global_scale, scale), _or(input_global_scale, scale),
        scale if bias is None else bias.contiguous(), out, m, n, k,
        NVFP4=format == "nvfp4", INPUT_GLOBAL=input_global_scale is not None, BACKWARD=backward, BIAS=bias is not None,
        WIDE=INTERPRET or config["PRECISION"] == "tf32", V=BLOCKS[format], **config,
    )  # fmt: skip
    return out


def _launch_codes(
    codes: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor | None,
    input_global_scale: Tensor | None, bias: Tensor | None, out: Tensor, format: str,
) -> Tensor:  # fmt: skip
    m, n = out.shape
    grid = (triton.cdiv(m, _CODES_CONFIG["BM"]) * triton.cdiv(n, _CODES_CONFIG["BN"]),)
    _codes_kernel[grid](
        codes, x_scale, packed, scale, _or(global_scale, scale), _or(input_global_scale, scale),
        scale if bias is None else bias.contiguous(), out, m, n, 2 * packed.size(1),
        NVFP4=format == "nvfp4", BIAS=bias is not None, V=BLOCKS[format], **_CODES_CONFIG,
    )  # fmt: skip
    return out


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something to point at: an argument that the kernel does not read cannot be None."""
    return other if tensor is None else tensor


def _config(m: int, dtype: torch.dtype, format: str, *, hip: bool) -> dict[str, Any]:
    stages = 2 if hip else 3
    if dtype == torch.float32:
        return {"PRECISION": "ieee", "BM": 32, "BN": 32, "BK": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2}
    if dtype == torch.float16 and format == "mxfp4":
        precision = "ieee" if hip else "tf32"
        return {"PRECISION": precision, "BM": 32, "BN": 64, "BK": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    if m <= 16:
        return {"PRECISION": "ieee", "BM": 16, "BN": 64, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": stages}
    if m <= 64:
        return {"PRECISION": "ieee", "BM": 64, "BN": 64, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": stages}
    return {"PRECISION": "ieee", "BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 2}


_CODES_CONFIG: dict[str, Any] = {"BM": 128, "BN": 128, "BK": 256, "GROUP": 8, "num_warps": 4, "num_stages": 3}


def _aot_cases() -> list[AotCase]:
    cases = []
    for format in BLOCKS:
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
            if format == "mxfp4" and dtype == torch.float32:
                continue  # decoded in the same steps as bfloat16, in blocks of the same size as nvfp4
            for m in (1, 64, 512) if name == "bf16" and format == "nvfp4" else (512,):
                for is_backward in (False, True):
                    for targets, hip in ((CUDA_TARGETS, False), (("gfx942",), True)):
                        config = _config(m, dtype, format, hip=hip)
                        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
                        wide = config["PRECISION"] == "tf32" or (format == "mxfp4" and dtype == torch.float16)
                        cases.append(
                            AotCase(
                                name=f"{'back' if is_backward else 'forward'}-{format}-{name}-m{m}-{targets[0][:2]}",
                                kernel=_weight_kernel,
                                signature={
                                    "x_ptr": f"*{name}", "x_stride": "i32", **_POINTERS, "bias_ptr": f"*{name}",
                                    "out_ptr": f"*{name}", "m": "i32", "n": "i32", "k": "i32",
                                },
                                constexprs={
                                    "NVFP4": format == "nvfp4", "INPUT_GLOBAL": False, "BACKWARD": is_backward,
                                    "BIAS": not is_backward, "WIDE": wide, "V": BLOCKS[format], **config,
                                },
                                options=options,
                                mma="any" if dtype == torch.bfloat16 else None,
                                targets=targets,
                                unaligned=("m",),
                            )
                        )  # fmt: skip
        config = dict(_CODES_CONFIG)
        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        cases.append(
            AotCase(
                name=f"codes-{format}",
                kernel=_codes_kernel,
                signature={
                    "x_ptr": "*u8", "x_scale_ptr": "*u8", **_POINTERS, "bias_ptr": "*bf16", "out_ptr": "*bf16",
                    "m": "i32", "n": "i32", "k": "i32",
                },
                constexprs={"NVFP4": format == "nvfp4", "BIAS": True, "V": BLOCKS[format], **config},
                options=options,
                mma="any",
                targets=("sm_100",),
                unaligned=("m",),
            )
        )  # fmt: skip
    return cases


_POINTERS = {"packed_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32", "input_global_ptr": "*fp32"}
AOT_CASES = _aot_cases()
