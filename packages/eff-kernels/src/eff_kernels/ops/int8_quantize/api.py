"""int8_quantize_rows and int8_quantize_columns: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.int8_quantize import cpu, reference
from eff_kernels.ops.int8_quantize.args import Args, check

_TRITON = "eff_kernels.ops.int8_quantize.triton"

ROWS_OP = Op(
    "int8_quantize_rows",
    schema_of(Args, "(Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", cpu.quantize_rows, cpu.reject),
        triton_backend(_TRITON, run="quantize_rows"),
        Backend("reference", reference.quantize_rows),
    ],
    fake=lambda x, threshold: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:1], dtype=torch.float32),
        x.new_empty(x.shape[1:], dtype=torch.bool),
    ),
)

COLUMNS_OP = Op(
    "int8_quantize_columns",
    schema_of(Args, "(Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", cpu.quantize_columns, cpu.reject),
        triton_backend(_TRITON, run="quantize_columns"),
        Backend("reference", reference.quantize_columns),
    ],
    fake=lambda x, threshold: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[1:], dtype=torch.float32),
        x.new_empty(x.shape[1:], dtype=torch.bool),
    ),
)


class Int8Rows(NamedTuple):
    """Result of `int8_quantize_rows`: x is about codes * absmax / 127, row by row, outside the outlier columns."""

    codes: Tensor
    absmax: Tensor
    outlier_columns: Tensor


class Int8Columns(NamedTuple):
    """Result of `int8_quantize_columns`: x is about codes * absmax / 127, column by column, outside the outliers."""

    codes: Tensor
    absmax: Tensor
    outlier_columns: Tensor


def int8_quantize_rows(x: Tensor, *, threshold: float = 0.0, backend: str = "auto") -> Int8Rows:
    """Quantise each row to int8 by its largest magnitude, leaving out columns with outliers (LLM.int8(), section 3).

    codes = round(x * 127 / absmax), half to even, with absmax = max |x| over the row's entries below the threshold.
    A column with an entry of magnitude >= threshold in any row is an outlier column: its codes are 0, while its entries
    below the threshold still count for the absmax of their row (bitsandbytes does the same, and gives equal codes).

    Args:
        x: Rows, [..., K]; any float dtype. Arithmetic is in float32.
        threshold: Magnitude from which an entry is an outlier; 0 means that none is.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        Int8Rows(codes int8 [..., K], absmax float32 [...], outlier_columns int64 [n], ascending). A row of zeros has
        0; a row with a NaN, or an infinity that is no outlier, has absmax NaN; the codes of both are 0.

    Raises:
        ValueError: ``x`` is a scalar, or ``threshold`` is negative or NaN.
        TypeError: ``x`` is not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.
    """
    check(x, threshold)
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.size(-1))
    codes, absmax, columns = ROWS_OP(rows, float(threshold), backend=backend)
    if x.dim() != 2:
        codes, absmax = codes.view(x.shape), absmax.view(x.shape[:-1])
    return Int8Rows(codes, absmax, columns.nonzero().view(-1))


def int8_quantize_columns(x: Tensor, *, threshold: float = 0.0, backend: str = "auto") -> Int8Columns:
    """Quantise each column to int8 by its largest magnitude; the counterpart of `int8_quantize_rows`.

    Args:
        x: Matrix, [T, K]; any float dtype. Arithmetic is in float32.
        threshold: Magnitude from which an entry makes its column an outlier column, with codes of 0; 0 means none.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        Int8Columns(codes int8 [T, K], absmax float32 [K], outlier_columns int64 [n], ascending).

    Raises:
        ValueError: ``x`` is not a matrix, or ``threshold`` is negative or NaN.
        TypeError: ``x`` is not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.
    """
    check(x, threshold)
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix [T, K], got shape {list(x.shape)}")
    codes, absmax, columns = COLUMNS_OP(x, float(threshold), backend=backend)
    return Int8Columns(codes, absmax, columns.nonzero().view(-1))
