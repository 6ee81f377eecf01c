"""int8_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.common import over_rows
from eff_kernels.ops.int8_linear import cpu, reference
from eff_kernels.ops.int8_linear.args import Args, check
from eff_kernels.ops.int8_linear.autograd import backward, setup_context

OP = Op(
    "int8_linear",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.int8_linear, cpu.reject),
        triton_backend("eff_kernels.ops.int8_linear.triton"),
        Backend("reference", reference.int8_linear),
    ],
    fake=lambda x, weight, *options: x.new_empty((x.shape[0], weight.shape[0]), dtype=options[-1]),
    setup_context=setup_context,
    backward=backward,
)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float = 0.0,
    per_token_outliers: bool = False,
    activation: Literal["dynamic", "none"] = "dynamic",
    activation_group: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply by an int8 weight: LLM.int8(), sections 2 and 3.

    y = (sum over groups g of columns: codes_g @ weight_g^T * rowmax_g / 127) * absmax / 127
        + x[:, out] @ (weight[:, out] * absmax / 127)^T + bias

    The activations are quantised row by row (see `int8_quantize_rows`), each row as a whole or in groups of columns.
    The integer products are exact, and the columns ``out`` that hold an activation of magnitude >= threshold are
    multiplied in floating point. Sums are float32, rounded once.
    Differentiable in x and bias: dx = dy @ dequantised weight, so that adapters can be trained on a frozen int8 base.

    Args:
        x: Activations, [..., K]; any float dtype.
        weight: Codes from -127 to 127, int8 [N, K].
        absmax: Largest magnitude of each weight row, float32 [N] (``SCB`` of bitsandbytes): weight row n stands for
            weight[n] * absmax[n] / 127.
        bias: [N], any float dtype.
        threshold: Magnitude from which activations count as outliers; 0 means that none does. With outliers a row's
            result depends on the other rows: an outlier anywhere takes its whole column out of the int8 product.
        per_token_outliers: Take out only the outlying entries themselves, which makes rows independent of each other.
        activation: "dynamic" quantises x; "none" leaves it as it is (weight-only; no outliers then).
        activation_group: Give each row of x one scale for every so many consecutive columns, a multiple of 32; the last
            group may be shorter. Fewer columns to a scale round activations less. None: one scale for the whole row.
        out_dtype: Dtype of the result; that of ``x`` by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., N] of ``out_dtype``. A row of x with a NaN, or an infinity that is no outlier, gives a row of NaN.

    Raises:
        ValueError: shapes do not fit, ``threshold`` is negative or NaN, ``activation`` is unknown,
            ``activation_group`` is no positive multiple of 32 or comes with ``activation="none"``.
        TypeError: ``weight`` is not int8, ``absmax`` not float32, or ``x`` or ``bias`` not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.
    """
    args = (
        x, weight, absmax, bias, float(threshold), per_token_outliers, activation, activation_group,
        out_dtype or x.dtype,
    )  # fmt: skip
    check(*args)
    if activation_group is not None and activation_group >= x.shape[-1]:
        args = (*args[:-2], None, args[-1])
    return over_rows(OP, *args, backend=backend)
