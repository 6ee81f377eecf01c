"""group_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of
from eff_kernels.ops.common import check_float, check_vector, over_rows
from eff_kernels.ops.group_linear import cpu, reference
from eff_kernels.ops.group_linear.args import Args
from eff_kernels.ops.group_linear.autograd import backward, setup_context
from eff_kernels.ops.group_linear.pack import GroupWeight

OP = Op(
    "group_linear",
    schema_of(Args, "Tensor"),
    [Backend("cpu", cpu.group_linear, cpu.reject), Backend("reference", reference.group_linear)],
    fake=lambda x, packed, bias, n, *options: x.new_empty((x.shape[0], n), dtype=options[-1]),
    setup_context=setup_context,
    backward=backward,
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
    bits whatever the other rows are. Differentiable in x and bias, straight through rounding.

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
    if not x.dim() or x.shape[-1] != weight.k:
        raise ValueError(f"x [..., k] and weight {[weight.n, weight.k]} do not fit: got {list(x.shape)}")
    check_float(x)
    if bias is not None:
        check_vector(bias, "bias", weight.n)
        check_float(bias, "bias")
    options = (weight.n, weight.bits, weight.offset, weight.minima, weight.wide, out_dtype or x.dtype)
    return over_rows(OP, x, weight.packed, bias, *options, backend=backend)
