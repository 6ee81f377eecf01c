"""Triton kernels of int8_quantize_rows and int8_quantize_columns. Not yet run on a GPU: compiled and interpreted only.

Without outliers one kernel reads a row twice, the second time from the cache. With outliers every row must have been
seen before the first code can be written, so one kernel finds the absmax and marks the outlier columns, another writes
the codes; the host waits for neither.

Magnitudes are compared as the integers that their bits spell: for floats without sign that is the same order, NaN comes
above infinity and is therefore never lost, and an atomic maximum exists.

R: rows of a program. C: columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import AotCase
from eff_kernels.ops.int8_quantize.args import Args

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 4096  # elements of a block
_SMALLEST = tl.constexpr(3.7323e-37)  # below it, 127 / absmax is infinite
_INFINITY = tl.constexpr(0x7F800000)
# Adding it leaves no bits after the point, so the sum is rounded to a whole number, half to even.
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23
# A fused multiply-add in front of that rounding would skip the rounding of the product: other codes in rare cases.
_OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _magnitude(x, threshold, OUTLIERS: tl.constexpr):
    """Bits of |x|, 0 for outliers; and where the outliers are."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    outlier = (tl.abs(x) >= threshold) & OUTLIERS
    return tl.where(outlier, 0, bits), outlier


@triton.jit
def _finish(bits):
    """The absmax of those bits: NaN for infinity, for which there is no code."""
    return tl.where(bits < _INFINITY, bits, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def _scale(absmax):
    """127 / absmax in the steps of the reference; 0 where all codes are to be 0."""
    some = absmax >= _SMALLEST
    scale = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.where(some, absmax, 1.0)) * 127.0
    return tl.where(some, scale, 0.0)


@triton.jit
def _encode(x, scale, zero):
    """Codes of x, 0 where asked for and for NaN and infinity."""
    product = tl.where(zero | ~(tl.abs(x) < float("inf")), 0.0, x) * scale
    return ((product + _ROUND) - _ROUND).to(tl.int8)


@triton.jit
def _columns_of(row_R, rows, k, group, groups, first, C: tl.constexpr):
    """Columns of x that a block of the groups R takes, and which of them there are."""
    inside_C = first + tl.arange(0, C)
    column_RC = (row_R % groups * group)[:, None] + inside_C[None, :]
    return column_RC, (row_R < rows)[:, None] & (inside_C < group)[None, :] & (column_RC < k)


@triton.jit
def _row_bits(
    x_ptr, x_stride, threshold, flags_ptr, row_R, rows, k, group, groups,
    OUTLIERS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Bits of the absmax of each row; marks the outlier columns on the way."""
    bits_R = tl.zeros([R], tl.int32)
    for first in range(0, group, C):
        column_RC, mask_RC = _columns_of(row_R, rows, k, group, groups, first, C)
        x_RC = tl.load(x_ptr + (row_R // groups * x_stride)[:, None] + column_RC, mask_RC, other=0.0).to(tl.float32)
        bits_RC, outlier_RC = _magnitude(x_RC, threshold, OUTLIERS)
        bits_R = tl.maximum(bits_R, tl.max(bits_RC, 1))
        if OUTLIERS:
            tl.store(flags_ptr + column_RC, tl.full([R, C], 1, tl.uint8), outlier_RC & mask_RC)
    return bits_R


@triton.jit
def _row_absmax_kernel(
    x_ptr, x_stride, threshold, absmax_ptr, flags_ptr, rows, k, group, groups, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    bits_R = _row_bits(x_ptr, x_stride, threshold, flags_ptr, row_R, rows, k, group, groups, True, R, C)
    tl.store(absmax_ptr + row_R, _finish(bits_R), row_R < rows)


@triton.jit
def _list_columns(flags_ptr, columns_ptr, k, C: tl.constexpr):
    """Write the numbers of the flagged columns, ascending, and their count at position k."""
    count = 0
    for first in range(0, k, C):
        column_C = first + tl.arange(0, C)
        flag_C = tl.load(flags_ptr + column_C, column_C < k, other=0).to(tl.int32)
        tl.store(columns_ptr + count + tl.cumsum(flag_C, 0) - 1, column_C, flag_C > 0)
        count += tl.sum(flag_C, 0)
    tl.store(columns_ptr + k, count)


@triton.jit
def _row_codes_kernel(
    x_ptr, x_stride, threshold, absmax_ptr, flags_ptr, codes_ptr, columns_ptr, rows, k, group, groups,
    OUTLIERS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, LIST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    if OUTLIERS:
        absmax_R = tl.load(absmax_ptr + row_R, row_R < rows, other=0.0)
    else:
        absmax_R = _finish(_row_bits(x_ptr, x_stride, threshold, flags_ptr, row_R, rows, k, group, groups, False, R, C))
        tl.store(absmax_ptr + row_R, absmax_R, row_R < rows)
    scale_R = _scale(absmax_R)
    for first in range(0, group, C):
        column_RC, mask_RC = _columns_of(row_R, rows, k, group, groups, first, C)
        x_RC = tl.load(x_ptr + (row_R // groups * x_stride)[:, None] + column_RC, mask_RC, other=0.0).to(tl.float32)
        zero_RC = (tl.abs(x_RC) >= threshold) & OUTLIERS
        if OUTLIERS and WHOLE_COLUMNS:
            zero_RC = zero_RC | (tl.load(flags_ptr + column_RC, mask_RC, other=0) != 0)
        codes_RC = _encode(x_RC, scale_R[:, None], zero_RC)
        tl.store(codes_ptr + (row_R // groups * k)[:, None] + column_RC, codes_RC, mask_RC)
    if LIST:  # noqa: SIM102 - a constexpr: no branch is compiled without it
        if tl.program_id(0) == 0:
            _list_columns(flags_ptr, columns_ptr, k, 1024)


@triton.jit
def _column_absmax_kernel(
    x_ptr, x_stride, threshold, bits_ptr, flags_ptr, rows, k, OUTLIERS: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    row_R = tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)
    column_C = tl.program_id(0) * C + tl.arange(0, C)
    mask_RC = (row_R < rows)[:, None] & (column_C < k)[None, :]
    x_RC = tl.load(x_ptr + row_R[:, None] * x_stride + column_C[None, :], mask_RC, other=0.0).to(tl.float32)
    bits_RC, outlier_RC = _magnitude(x_RC, threshold, OUTLIERS)
    tl.atomic_max(bits_ptr + column_C, tl.max(bits_RC, 0), column_C < k)
    if OUTLIERS:
        found_C = tl.max((outlier_RC & mask_RC).to(tl.int32), 0) > 0
        tl.store(flags_ptr + column_C, tl.full([C], 1, tl.uint8), found_C)


@triton.jit
def _column_codes_kernel(
    x_ptr, x_stride, bits_ptr, flags_ptr, absmax_ptr, codes_ptr, rows, k, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    row_R = tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)
    column_C = tl.program_id(0) * C + tl.arange(0, C)
    mask_RC = (row_R < rows)[:, None] & (column_C < k)[None, :]
    absmax_C = _finish(tl.load(bits_ptr + column_C, column_C < k, other=0))
    if tl.program_id(1) == 0:
        tl.store(absmax_ptr + column_C, absmax_C, column_C < k)
    flag_C = tl.load(flags_ptr + column_C, column_C < k, other=0) != 0
    x_RC = tl.load(x_ptr + row_R[:, None] * x_stride + column_C[None, :], mask_RC, other=0.0).to(tl.float32)
    codes_RC = _encode(x_RC, _scale(absmax_C)[None, :], flag_C[None, :])
    tl.store(codes_ptr + row_R[:, None] * k + column_C[None, :], codes_RC, mask_RC)


def reject(*args: *Args) -> str | None:
    x, *_ = args
    return None if x.dtype in DTYPES else f"takes float32, bfloat16 and float16, got {x.dtype}"


def quantize_rows(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    x, threshold = args
    flags = x.new_zeros(x.size(1), dtype=torch.uint8)
    codes, absmax = _rows(x, threshold, None, flags, None, whole_columns=True)
    return codes, absmax.view(-1), flags.view(torch.bool)


def quantize_for_product(
    x: Tensor, threshold: float, per_token: bool, group: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [T, K] and absmax [T, groups] of x [T, K], and the outlier columns as the product wants them.

    Those are int32 [K + 1]: the numbers of the columns, ascending, and at position K how many there are, so that no
    count must travel to the host; None if ``threshold`` is 0. ``per_token`` leaves in what is no outlier itself.
    ``group`` columns of a row have one absmax, all of them if it is None.
    """
    if threshold == 0:
        return (*_rows(x, threshold, group, None, None, whole_columns=False), None)
    columns = x.new_empty(x.size(1) + 1, dtype=torch.int32)
    flags = x.new_zeros(x.size(1), dtype=torch.uint8)
    return (*_rows(x, threshold, group, flags, columns, whole_columns=not per_token), columns)


def quantize_columns(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    x, threshold = args
    rows, k = x.shape
    codes, absmax = x.new_empty(rows, k, dtype=torch.int8), x.new_zeros(k, dtype=torch.float32)
    bits, flags = x.new_zeros(k, dtype=torch.int32), x.new_zeros(k, dtype=torch.uint8)
    if x.numel() == 0:
        return codes, absmax, flags.view(torch.bool)
    x = _unit_stride(x)
    block = {"R": _BLOCK // 128, "C": 128}
    grid = (triton.cdiv(k, block["C"]), triton.cdiv(rows, block["R"]))
    _column_absmax_kernel[grid](
        x, x.stride(0), threshold, bits, flags, rows, k, OUTLIERS=threshold > 0, **block, **_OPTIONS
    )
    _column_codes_kernel[grid](x, x.stride(0), bits, flags, absmax, codes, rows, k, **block, **_OPTIONS)
    return codes, absmax, flags.view(torch.bool)


def _rows(
    x: Tensor,
    threshold: float,
    group: int | None,
    flags: Tensor | None,
    columns: Tensor | None,
    *,
    whole_columns: bool,
) -> tuple[Tensor, Tensor]:
    tokens, k = x.shape
    group = min(group or k, k)
    groups = triton.cdiv(k, group) if k else 1
    codes = x.new_empty(tokens, k, dtype=torch.int8)
    absmax = x.new_empty(tokens, groups, dtype=torch.float32)
    if tokens == 0:
        return codes, absmax
    x = _unit_stride(x)
    block = _row_block(group)
    rows = tokens * groups  # of the kernel
    grid = (triton.cdiv(rows, block["R"]),)
    marks = codes if flags is None else flags  # a kernel without outliers touches neither flags nor columns
    sizes = (rows, k, group, groups)
    if threshold > 0:
        _row_absmax_kernel[grid](x, x.stride(0), threshold, absmax, marks, *sizes, **block, **_OPTIONS)
    _row_codes_kernel[grid](
        x, x.stride(0), threshold, absmax, marks, codes, marks if columns is None else columns, *sizes,
        OUTLIERS=threshold > 0, WHOLE_COLUMNS=whole_columns, LIST=columns is not None, **block, **_OPTIONS,
    )  # fmt: skip
    return codes, absmax


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _row_block(k: int) -> dict[str, int]:
    """Columns for at most four loads of 16 bytes by a thread, rows to fill a block."""
    width = min(max(triton.next_power_of_2(k), 16), _BLOCK)
    return {"R": max(1, 2048 // width), "C": width}


def _aot_cases() -> list[AotCase]:
    def case(name: str, dtype: str, kernel: object, pointers: dict[str, str], **constexprs: object) -> AotCase:
        floats = {} if kernel is _column_codes_kernel else {"threshold": "fp32"}
        sizes = dict.fromkeys(("x_stride", "rows", "k"), "i32")
        if kernel in (_row_absmax_kernel, _row_codes_kernel):
            sizes |= {"group": "i32", "groups": "i32"}
        return AotCase(
            name=f"{name}-{dtype}",
            kernel=kernel,
            signature={"x_ptr": f"*{dtype}", **pointers, **sizes, **floats},
            constexprs=constexprs,
            options=_OPTIONS,
        )

    row, column = _row_block(4096), {"R": 32, "C": 128}
    common = {"absmax_ptr": "*fp32", "flags_ptr": "*u8"}
    codes = {**common, "codes_ptr": "*i8"}
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        cases += [
            case("row-absmax", dtype, _row_absmax_kernel, common, **row),
            case(
                "row-codes", dtype, _row_codes_kernel, {**codes, "columns_ptr": "*u8"},
                OUTLIERS=False, WHOLE_COLUMNS=True, LIST=False, **row,
            ),
            case(
                "row-codes-outliers", dtype, _row_codes_kernel, {**codes, "columns_ptr": "*i32"},
                OUTLIERS=True, WHOLE_COLUMNS=True, LIST=True, **row,
            ),
        ]  # fmt: skip
    bits = {"bits_ptr": "*i32", "flags_ptr": "*u8"}
    cases.append(case("column-absmax", "bf16", _column_absmax_kernel, bits, OUTLIERS=True, **column))
    cases.append(
        case(
            "column-codes", "fp32", _column_codes_kernel,
            {**bits, "absmax_ptr": "*fp32", "codes_ptr": "*i8"}, **column,
        )
    )  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
