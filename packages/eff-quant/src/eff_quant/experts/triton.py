"""Triton kernels that multiply sorted rows by the codes of their experts in one launch.

Not yet run on a GPU: compiled and interpreted only. A block of rows belongs to one expert; which one, and where the
block begins, is computed on the device, so that nothing waits for the host. Codes are decoded in registers by the
functions of the single layers' kernels. Rows behind the last expert's are left zero.

M: rows. N: outputs. K: inner dimension of a block. The weight of an expert is [rows, columns]: in the forward [n, k],
in the backward [k, n].
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from eff_kernels.aot import CUDA_TARGETS, INTERPRET, AotCase, on_hip
from eff_kernels.ops.fp4_linear.triton import decode as decode_fp4
from eff_kernels.ops.fp8_linear.triton import decode as decode_fp8
from eff_kernels.ops.int8_linear.triton import products
from eff_kernels.ops.int8_quantize.triton import quantize_for_product
from torch import Tensor

from eff_quant.experts.route import expert_of_rows
from eff_quant.layer import StackedCodes

BLOCKS = {"nvfp4": 16, "mxfp4": 32}
_COLUMNS = 16  # outlier columns of a block


@triton.jit
def _tile(
    codes_ptr, blocks_ptr, row_R, rows, first, columns, FORMAT: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Values [R, C] of a weight from column ``first`` on, without the scales of its rows."""
    line_R = row_R.to(tl.int64)[:, None]
    inside_R = (row_R < rows)[:, None]
    if V > 0:
        byte_H = first // 2 + tl.arange(0, C // 2)
        block_B = first // V + tl.arange(0, C // V)
        inside_RH = inside_R & (byte_H < columns // 2)[None, :]
        inside_RB = inside_R & (block_B < columns // V)[None, :]
        packed_RH = tl.load(codes_ptr + line_R * (columns // 2) + byte_H[None, :], inside_RH, other=0)
        scale_RB = tl.load(blocks_ptr + line_R * (columns // V) + block_B[None, :], inside_RB, other=0)
        value_RC = decode_fp4(packed_RH, scale_RB, V, FORMAT == "nvfp4", DTYPE)
    else:
        column_C = first + tl.arange(0, C)
        inside_RC = inside_R & (column_C < columns)[None, :]
        code_RC = tl.load(codes_ptr + line_R * columns + column_C[None, :], inside_RC, other=0)
        if FORMAT != "int8":
            code_RC = decode_fp8(code_RC, FORMAT == "e5m2")
        value_RC = code_RC.to(DTYPE)
    return value_RC


@triton.jit
def _float_kernel(
    x_ptr, x_stride, codes_ptr, blocks_ptr, scale_ptr, bias_ptr, out_ptr, offsets_ptr, expert_ptr, first_ptr, experts,
    n, k, FORMAT: tl.constexpr, V: tl.constexpr, BACKWARD: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Float rows times the decoded weight of their expert."""
    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert >= experts:
        return
    row_M = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, BM)
    end = tl.load(offsets_ptr + expert + 1)
    column_N = tl.program_id(1) * BN + tl.arange(0, BN)
    DTYPE: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    codes_ptr += expert.to(tl.int64) * (n * k // (2 if V > 0 else 1))
    if V > 0:
        blocks_ptr += expert.to(tl.int64) * (n * k // V)
    x_M = x_ptr + tl.minimum(row_M, end - 1).to(tl.int64) * x_stride
    sums_MN = tl.zeros([BM, BN], tl.float32)
    for first in range(0, k, BK):
        inner_K = first + tl.arange(0, BK)
        x_MK = tl.load(x_M[:, None] + inner_K[None, :], (inner_K < k)[None, :], other=0.0)
        if WIDE:
            x_MK = x_MK.to(tl.float32)
        if BACKWARD:
            if V == 0:
                scale_K = tl.load(scale_ptr + expert * k + inner_K, inner_K < k, other=0.0)
                x_MK = (x_MK.to(tl.float32) * scale_K[None, :]).to(x_MK.dtype)
            w_KN = _tile(codes_ptr, blocks_ptr, inner_K, k, tl.program_id(1) * BN, n, FORMAT, V, BN, DTYPE)
        else:
            w_KN = tl.trans(_tile(codes_ptr, blocks_ptr, column_N, n, first, k, FORMAT, V, BK, DTYPE))
        sums_MN = tl.dot(x_MK, w_KN, sums_MN, input_precision=PRECISION)
    if FORMAT == "nvfp4":
        sums_MN *= tl.load(scale_ptr + expert)
    elif V == 0 and not BACKWARD:
        sums_MN *= tl.load(scale_ptr + expert * n + column_N, column_N < n, other=0.0)[None, :]
    if BIAS:
        sums_MN += tl.load(bias_ptr + expert * n + column_N, column_N < n, other=0.0).to(tl.float32)[None, :]
    _store(out_ptr, sums_MN, row_M, end, column_N, n)


@triton.jit
def _int8_kernel(
    codes_ptr, rowmax_ptr, weight_ptr, scale_ptr, bias_ptr, x_ptr, x_stride, columns_ptr, counts_ptr, out_ptr,
    offsets_ptr, expert_ptr, first_ptr, experts, threshold, n, k, group,
    GROUPED: tl.constexpr, BIAS: tl.constexpr, OUTLIERS: tl.constexpr, PER_TOKEN: tl.constexpr, WIDEN: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows of int8 codes times the codes of their expert, and what of the rows stays float: ``columns`` [E, k]."""
    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert >= experts:
        return
    row_M = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, BM)
    end = tl.load(offsets_ptr + expert + 1)
    column_N = tl.program_id(1) * BN + tl.arange(0, BN)
    inside_M = tl.minimum(row_M, end - 1).to(tl.int64)
    weight_N = weight_ptr + expert.to(tl.int64) * n * k + (column_N % n).to(tl.int64) * k
    out_MN = products(
        codes_ptr + inside_M * k, rowmax_ptr, inside_M, weight_N, x_ptr + inside_M * x_stride,
        columns_ptr + expert * k, counts_ptr + expert, threshold, k, group,
        GROUPED, OUTLIERS, PER_TOKEN, WIDEN, EVEN, BM, BN, BK, BC,
    )  # fmt: skip
    out_MN *= tl.load(scale_ptr + expert * n + column_N, column_N < n, other=0.0)[None, :]
    if BIAS:
        out_MN += tl.load(bias_ptr + expert * n + column_N, column_N < n, other=0.0).to(tl.float32)[None, :]
    _store(out_ptr, out_MN, row_M, end, column_N, n)


@triton.jit
def _store(out_ptr, out_MN, row_M, end, column_N, n):
    """Write the rows of one expert in the dtype of the result."""
    offset_MN = row_M.to(tl.int64)[:, None] * n + column_N[None, :]
    mask_MN = (row_M < end)[:, None] & (column_N < n)[None, :]
    tl.store(out_ptr + offset_MN, out_MN.to(out_ptr.dtype.element_ty), mask_MN)


def forward(x: Tensor, codes: StackedCodes, offsets: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply rows by the weights of their experts.

    Args:
        x: Rows sorted by expert, [S, K]; float32, bfloat16 or float16.
        codes: Weights [E, N, K].
        offsets: Rows of expert e are those from ``offsets[e]`` up to ``offsets[e + 1]``, int32 [E + 1].
        bias: [E, N].
        dtype: Of the result.

    Returns:
        [S, N]; zero from row ``offsets[E]`` on.
    """
    out = x.new_zeros(x.size(0), codes.codes.size(1), dtype=dtype)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    if codes.rounding is not None:
        return _launch_int8(x, codes, offsets, bias, out)
    return _launch_float(x, codes, offsets, bias, out, backward=False)


def backward(grad: Tensor, codes: StackedCodes, offsets: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Gradient [S, K] of the rows: grad [S, N] times the decoded weights [E, N, K]."""
    out = grad.new_zeros(grad.size(0), k, dtype=dtype)
    if grad.numel() == 0 or out.numel() == 0:
        return out
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    return _launch_float(grad, codes, offsets, None, out, backward=True)


def _launch_float(
    x: Tensor, codes: StackedCodes, offsets: Tensor, bias: Tensor | None, out: Tensor, *, backward: bool
) -> Tensor:
    (m, n), k, experts = out.shape, x.size(1), len(codes.codes)
    scale = codes.scale
    if codes.format == "e4m3" and scale is not None:
        scale = scale * 256.0  # the codes are decoded to 2^-8 of their values
    config = _config(m // experts, x.dtype, codes.format, hip=on_hip())
    expert, first = _blocks(offsets, m, config["BM"])
    held = codes.codes.contiguous()
    _float_kernel[(len(expert), triton.cdiv(n, config["BN"]))](
        x, x.stride(0), held, _or(codes.blocks, held), _or(scale, held), _or(bias, held), out, offsets, expert, first,
        experts, n, k, FORMAT=codes.format, V=BLOCKS.get(codes.format, 0), BACKWARD=backward, BIAS=bias is not None,
        WIDE=INTERPRET or config["PRECISION"] == "tf32", **config,
    )  # fmt: skip
    return out


def _launch_int8(x: Tensor, codes: StackedCodes, offsets: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    (m, n), k, experts = out.shape, x.size(1), len(codes.codes)
    rounding = codes.rounding or {}
    threshold, per_token, group = rounding["threshold"], rounding["per_token"], rounding["group"]
    whole, columns, counts = x, offsets, offsets
    if threshold > 0:
        large = x.abs() >= threshold
        x = x.masked_fill(large, 0.0)  # an outlier counts to no scale, the rest of its column does
        expert_of_row = expert_of_rows(offsets, m)
        found = x.new_zeros(experts + 1, k, dtype=torch.float32).index_add_(0, expert_of_row, large.float()) > 0
        counts = found.sum(1, dtype=torch.int32)
        columns = found.to(torch.uint8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    rows, rowmax, _ = quantize_for_product(x, 0.0, False, group)
    if threshold > 0 and not per_token:
        rows.masked_fill_(found[expert_of_row], 0)
    config = _int8_config(m // experts, group, hip=on_hip())
    expert, first = _blocks(offsets, m, config["BM"])
    held = codes.codes.contiguous()
    _int8_kernel[(len(expert), triton.cdiv(n, config["BN"]))](
        rows, rowmax, held, codes.scale, _or(bias, held), whole, whole.stride(0), columns, counts, out,
        offsets, expert, first, experts, threshold, n, k, group or k,
        GROUPED=group is not None, BIAS=bias is not None, OUTLIERS=threshold > 0, PER_TOKEN=per_token,
        WIDEN=INTERPRET, EVEN=k % config["BK"] == 0, **config,
    )  # fmt: skip
    return out


def _blocks(offsets: Tensor, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Expert and first row of each block of ``size`` rows; the expert is E for the blocks that are too many."""
    experts = len(offsets) - 1
    blocks = (offsets.diff() + size - 1) // size
    ends = blocks.cumsum(0, dtype=torch.int32)
    number = torch.arange(rows // size + min(experts, rows), device=offsets.device, dtype=torch.int32)
    expert = torch.searchsorted(ends, number, right=True, out_int32=True)
    real = expert.clamp(max=experts - 1)
    return expert, offsets[real] + (number - ends[real] + blocks[real]) * size


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something to point at: an argument that the kernel does not read cannot be None."""
    return other if tensor is None else tensor.contiguous()


def _config(m: int, dtype: torch.dtype, format: str, *, hip: bool) -> dict[str, Any]:
    """Blocks for so many rows an expert."""
    stages = 2 if hip else 3
    if dtype == torch.float32:
        return {"PRECISION": "ieee", "BM": 32, "BN": 32, "BK": 32, "num_warps": 8, "num_stages": 2}
    if dtype == torch.float16 and format == "mxfp4":  # powers of two leave the range of float16
        return {"PRECISION": "ieee" if hip else "tf32", "BM": 32, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    if m <= 16:
        return {"PRECISION": "ieee", "BM": 16, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": stages}
    return {"PRECISION": "ieee", "BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": stages}


def _int8_config(m: int, group: int | None, *, hip: bool) -> dict[str, int]:
    """No block of inputs reaches into the next group."""
    block = {"BM": 16, "BN": 32, "BK": 128} if m <= 16 else {"BM": 64, "BN": 64, "BK": 128}
    while group is not None and group % block["BK"]:
        block["BK"] //= 2
    return {**block, "BC": _COLUMNS, "num_warps": 4, "num_stages": 2 if hip else 3}


_INDEX = {"offsets_ptr": "*i32", "expert_ptr": "*i32", "first_ptr": "*i32", "experts": "i32", "n": "i32", "k": "i32"}


def _case(format: str, name: str, dtype: torch.dtype, m: int, targets: tuple[str, ...], *, back: bool) -> AotCase:
    config = _config(m, dtype, format, hip=targets == ("gfx942",))
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    return AotCase(
        name=f"{'backward' if back else 'forward'}-{format}-{name}-m{m}-{targets[0][:2]}",
        kernel=_float_kernel,
        signature={
            "x_ptr": f"*{name}", "x_stride": "i32", "codes_ptr": "*i8" if format == "int8" else "*u8",
            "blocks_ptr": "*u8", "scale_ptr": "*fp32", "bias_ptr": f"*{name}", "out_ptr": f"*{name}", **_INDEX,
        },
        constexprs={
            "FORMAT": format, "V": BLOCKS.get(format, 0), "BACKWARD": back, "BIAS": not back,
            "WIDE": config["PRECISION"] == "tf32" or (format == "mxfp4" and dtype == torch.float16), **config,
        },
        options=options,
        mma="any" if dtype == torch.bfloat16 else None,
        targets=targets,
        unaligned=("experts",),
    )  # fmt: skip


def _int8_case(m: int, group: int | None, targets: tuple[str, ...]) -> AotCase:
    config: dict[str, Any] = _int8_config(m, group, hip=targets == ("gfx942",))
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    return AotCase(
        name=f"rounded-int8-m{m}-g{group}-{targets[0][:2]}",
        kernel=_int8_kernel,
        signature={
            "codes_ptr": "*i8", "rowmax_ptr": "*fp32", "weight_ptr": "*i8", "scale_ptr": "*fp32", "bias_ptr": "*bf16",
            "x_ptr": "*bf16", "x_stride": "i32", "columns_ptr": "*i32", "counts_ptr": "*i32", "out_ptr": "*bf16",
            **_INDEX, "threshold": "fp32", "group": "i32",
        },
        constexprs={
            "GROUPED": group is not None, "BIAS": True, "OUTLIERS": True, "PER_TOKEN": False, "WIDEN": False,
            "EVEN": True, **config,
        },
        options=options,
        mma="int8",
        targets=targets,
        unaligned=("experts",),
    )  # fmt: skip


AOT_CASES = [
    *(
        _case(format, "bf16", torch.bfloat16, m, targets, back=back)
        for format in ("int8", "e4m3", "nvfp4", "mxfp4")
        for m, back in ((1, False), (64, True))
        for targets in (CUDA_TARGETS, ("gfx942",))
    ),
    _case("nvfp4", "bf16", torch.bfloat16, 64, CUDA_TARGETS, back=False),
    _case("mxfp4", "fp16", torch.float16, 64, ("sm_80",), back=False),
    _case("e5m2", "fp16", torch.float16, 1, ("sm_90",), back=False),
    _case("nvfp4", "fp32", torch.float32, 64, ("sm_80",), back=False),
    *(_int8_case(m, group, targets) for m, group in ((1, 128), (64, None)) for targets in (CUDA_TARGETS, ("gfx942",))),
]
