"""fp8_quantize and fp8_round: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.fp8_quantize import cpu, reference
from eff_kernels.ops.fp8_quantize.args import Args, check

OP = Op(
    "fp8_quantize",
    schema_of(Args, "(Tensor, Tensor)"),
    [
        Backend("cpu", cpu.quantize, cpu.reject),
        triton_backend("eff_kernels.ops.fp8_quantize.triton", run="quantize"),
        Backend("reference", reference.quantize),
    ],
    fake=lambda x, dtype, power_of_two: (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(x.shape[:1], dtype=torch.float32),
    ),
)

ROUND_OP = Op(
    "fp8_round",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.round_rows, cpu.reject),
        triton_backend("eff_kernels.ops.fp8_quantize.triton", run="round_rows"),
        Backend("reference", reference.round_rows),
    ],
    fake=lambda x, dtype, power_of_two: x.new_empty(x.shape),
    backward=lambda ctx, grad: (grad, None, None),
)


class FP8Rows(NamedTuple):
    """Result of `fp8_quantize`: x is about codes * scale, row by row."""

    codes: Tensor
    scale: Tensor


def fp8_quantize(
    x: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, power_of_two: bool = False, backend: str = "auto"
) -> FP8Rows:
    """Round each row to FP8, scaled so that its largest magnitude becomes the largest number of the format.

    scale = max(max |x|, 1e-12) / M with M = 448 (E4M3) or 57344 (E5M2), and codes = x / scale clamped to -M .. M and
    rounded half to even. All in float32, whatever the dtype of x.

    Args:
        x: Rows, [..., K]; any float dtype.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        power_of_two: Round the scale up to a power of two; quantising what was quantised then changes no bit.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        FP8Rows(codes of ``dtype`` [..., K], scale float32 [...]). A row of zeros has codes of zero; a row with a NaN or
        an infinity has a scale and codes that are all NaN.

    Raises:
        ValueError: ``x`` is a scalar.
        TypeError: ``x`` is not of a float dtype, or ``dtype`` is neither of the two.
        BackendError: the named backend cannot run this call; the message says why.

    Example:
        >>> fp8_quantize(torch.tensor([[1.0, -0.5, 0.3, 7.0]])).scale
        tensor([0.0156])
    """
    check(x, dtype, power_of_two)
    codes, scale = OP(_rows(x), dtype, power_of_two, backend=backend)
    return FP8Rows(codes.view(dtype).view(x.shape), scale.view(x.shape[:-1]))


def fp8_round(
    x: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, power_of_two: bool = False, backend: str = "auto"
) -> Tensor:
    """Round each row to numbers that FP8 and one scale express; the gradient passes as if nothing were rounded.

    The values are ``codes * scale`` of `fp8_quantize`, rounded once to the dtype of x. Nothing is kept for the
    backward.

    Args:
        x: Rows, [..., K]; any float dtype.
        dtype: As for `fp8_quantize`.
        power_of_two: As for `fp8_quantize`.
        backend: As for `fp8_quantize`.

    Returns:
        Tensor like ``x``, contiguous. A row with a NaN or an infinity is all NaN.

    Raises:
        ValueError, TypeError, BackendError: As for `fp8_quantize`.
    """
    check(x, dtype, power_of_two)
    return ROUND_OP(_rows(x), dtype, power_of_two, backend=backend).view(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.size(-1))
