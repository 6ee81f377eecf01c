"""int4_linear and int8_static_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.common import over_rows
from eff_kernels.ops.int4_linear import cpu, reference
from eff_kernels.ops.int4_linear.args import Args, check
from eff_kernels.ops.int4_linear.autograd import backward, setup_context

# One op for both public functions: a packed weight is uint8, an unpacked one int8.
OP = Op(
    "int4_linear",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.linear, cpu.reject),
        triton_backend("eff_kernels.ops.int4_linear.triton"),
        Backend("reference", reference.linear),
    ],
    fake=lambda x, weight, *options: x.new_empty((x.shape[0], weight.shape[0]), dtype=options[-1]),
    setup_context=setup_context,
    backward=backward,
)


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply int8 activations by a 4-bit weight that stays packed (W4A8).

    y = (codes(x) @ weight^T) * rowmax / 127 * scale + bias, or without ``rowmax / 127`` where ``input_scale`` is given

    The activations are quantised within the call. Without ``input_scale`` each row by its largest magnitude, codes(x) =
    round(x * 127 / rowmax). With it codes(x) = clamp(round(x / input_scale), -128, 127), and the weight's codes and
    scale must stand for weight * input_scale, which makes one integer product of a scale for each column. All integer
    sums are exact for K < 2^21; scales and bias are applied in float32, rounded once.
    Differentiable in x and bias, straight through rounding and clamping: dx = dy @ (codes * scale / input_scale).

    Args:
        x: Activations, [..., K]; any float dtype.
        packed: Codes from -8 to 7 in two's complement, uint8 [N, K / 2], the even index in the low half of a byte
            (`int4_pack`).
        scale: Factor of each weight row, float32 [N].
        bias: [N], any float dtype.
        input_scale: Static scale of each column of x, float32 [K], positive; None quantises row by row.
        out_dtype: Dtype of the result; that of ``x`` by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., N] of ``out_dtype``. A row of x with a NaN or an infinity gives a row of NaN.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ``packed`` is not uint8, a scale is not float32, or ``x`` or ``bias`` is not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.
    """
    if packed.dtype is not torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    args = (x, packed, scale, bias, input_scale, out_dtype or x.dtype)
    check(*args)
    return over_rows(OP, *args, backend=backend)


def int8_static_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply statically quantised activations by an int8 weight (W8A8): `int4_linear` for codes of eight bits.

    y = (clamp(round(x / input_scale), -128, 127) @ weight^T) * scale + bias

    Integer sums are exact for K < 2^17. For activations that are quantised row by row use `int8_linear`.

    Args:
        x: Activations, [..., K]; any float dtype.
        weight: Codes, int8 [N, K]; weight * scale stands for the layer's weight times ``input_scale``.
        scale: Factor of each weight row, float32 [N].
        input_scale: Static scale of each column of x, float32 [K], positive.
        bias: [N], any float dtype.
        out_dtype: Dtype of the result; that of ``x`` by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., N] of ``out_dtype``. A row of x with a NaN or an infinity gives a row of NaN.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ``weight`` is not int8, a scale is not float32, or ``x`` or ``bias`` is not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.
    """
    if weight.dtype is not torch.int8:
        raise TypeError(f"weight must be int8, got {weight.dtype}")
    args = (x, weight, scale, bias, input_scale, out_dtype or x.dtype)
    check(*args)
    return over_rows(OP, *args, backend=backend)
