"""int8_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.int8_linear import cpu, reference
from eff_kernels.ops.int8_linear.backward import BACKWARD_OP
from eff_kernels.ops.int8_quantize.api import check_float, check_threshold

GROUP_STEP = 32
"""Groups of activations are whole steps of the kernels."""

_ACTIVATIONS = ("dynamic", "none")


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, absmax, bias = inputs[:4]
    ctx.save_for_backward(weight, absmax)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, absmax = ctx.saved_tensors
    grad = grad.contiguous()
    dx = BACKWARD_OP(grad, weight, absmax, ctx.x_dtype, backend=ctx.backend) if ctx.needs_input_grad[0] else None
    dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None, None, None, None, None


OP = Op(
    "int8_linear",
    "(Tensor x, Tensor weight, Tensor absmax, Tensor? bias, float threshold, bool per_token_outliers, str activation, "
    "int? activation_group, ScalarType out_dtype) -> Tensor",
    [
        Backend("cpu", cpu.int8_linear, cpu.reject),
        triton_backend("eff_kernels.ops.int8_linear.triton"),
        Backend("reference", reference.int8_linear),
    ],
    fake=lambda x, weight, *options: x.new_empty((x.shape[0], weight.shape[0]), dtype=options[-1]),
    setup_context=_remember,
    backward=_backward,
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
    shape, stored = x.shape, weight.shape
    if len(stored) != 2 or not shape or shape[-1] != stored[1]:
        raise ValueError(f"x [..., K] and weight [N, K] do not fit: got {list(shape)} and {list(stored)}")
    if weight.dtype is not torch.int8:
        raise TypeError(f"weight must be int8, got {weight.dtype}")
    if absmax.dtype is not torch.float32:
        raise TypeError(f"absmax must be float32, got {absmax.dtype}")
    n = stored[0]
    if absmax.shape != (n,):
        raise ValueError(f"absmax must have shape [{n}], got {list(absmax.shape)}")
    if bias is not None:
        check_float(bias)
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape [{n}], got {list(bias.shape)}")
    check_float(x)
    check_threshold(threshold)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be 'dynamic' or 'none', got {activation!r}")
    if activation_group is not None:
        check_activation_group(activation_group)
        if activation == "none":
            raise ValueError(f"activation_group={activation_group} with activation='none', which has no scales")
        if activation_group >= shape[-1]:
            activation_group = None
    arguments = (
        weight, absmax, bias, float(threshold), per_token_outliers, activation, activation_group, out_dtype or x.dtype
    )  # fmt: skip
    if len(shape) == 2:
        return OP(x, *arguments, backend=backend)
    rows = x.reshape(shape[:-1].numel(), shape[-1])
    return OP(rows, *arguments, backend=backend).view(*shape[:-1], n)


def check_activation_group(group: int) -> None:
    """Raise ValueError unless activations can have one scale for each ``group`` columns."""
    if group < 1 or group % GROUP_STEP:
        raise ValueError(f"activation_group must be a positive multiple of {GROUP_STEP} or None, got {group}")
