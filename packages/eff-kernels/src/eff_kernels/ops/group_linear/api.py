"""group_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op
from eff_kernels.ops.group_linear import cpu, reference
from eff_kernels.ops.group_linear.pack import GroupWeight
from eff_kernels.ops.int8_quantize.api import check_float


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, *ctx.layout, _ = inputs
    ctx.save_for_backward(packed)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx = dbias = None
    precise = torch.promote_types(grad.dtype, torch.float32)
    if ctx.needs_input_grad[0]:
        (packed,) = ctx.saved_tensors
        weight = GroupWeight(packed, *ctx.layout).dequantize()
        dx = (grad.to(precise) @ weight.to(precise)).to(ctx.x_dtype)
    if ctx.needs_input_grad[2]:
        dbias = grad.sum(0, dtype=precise).to(ctx.bias_dtype)
    return dx, None, dbias, None, None, None, None, None, None


OP = Op(
    "group_linear",
    "(Tensor x, Tensor packed, Tensor? bias, int n, int bits, int offset, bool minima, bool wide, "
    "ScalarType out_dtype) -> Tensor",
    [Backend("cpu", cpu.group_linear, cpu.reject), Backend("reference", reference.group_linear)],
    fake=lambda x, packed, bias, n, *options: x.new_empty((x.shape[0], n), dtype=options[-1]),
    setup_context=_remember,
    backward=_backward,
)


def group_linear(
    x: Tensor,
    weight: GroupWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply int8 activations by a weight of 4 or 8 bits, both in groups of 32 columns.

    y[n] = sum_g step_g * scale[n, g] * sum_k (code[n, k] - offset) * a_k + step_g * minimum[n, g] * sum_k a_k + bias[n]

    Each group of a row of x is quantised by its own largest magnitude: a_k = round(x_k / step_g), step_g = max|x|/127.
    The sums of a group are exact integers, those over groups float32, rounded once. On the CPU a row of y has the same
    bits whatever rows stand beside it. Differentiable in x and bias, straight through rounding.

    Args:
        x: Activations, [..., k]; any float dtype.
        weight: [n, k].
        bias: [n], any float dtype.
        out_dtype: Dtype of the result; that of ``x`` by default.
        backend: "auto", "cpu" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., n] of ``out_dtype``. A row of x with a NaN or an infinity gives a row of NaN.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ``x`` or ``bias`` is not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.
    """
    shape = x.shape
    if not shape or shape[-1] != weight.k:
        raise ValueError(f"x [..., k] and weight {[weight.n, weight.k]} do not fit: got {list(shape)}")
    check_float(x)
    if bias is not None:
        check_float(bias)
        if bias.shape != (weight.n,):
            raise ValueError(f"bias must have shape [{weight.n}], got {list(bias.shape)}")
    options = (weight.n, weight.bits, weight.offset, weight.minima, weight.wide, out_dtype or x.dtype)
    if len(shape) == 2:
        return OP(x, weight.packed, bias, *options, backend=backend)
    rows = x.reshape(shape[:-1].numel(), shape[-1])
    return OP(rows, weight.packed, bias, *options, backend=backend).view(*shape[:-1], weight.n)
