"""fp8_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.common import over_rows
from eff_kernels.ops.fp8_linear import cpu, reference
from eff_kernels.ops.fp8_linear.args import Args, check
from eff_kernels.ops.fp8_linear.autograd import backward, setup_context

OP = Op(
    "fp8_linear",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.fp8_linear, cpu.reject),
        triton_backend("eff_kernels.ops.fp8_linear.triton", run="fp8_linear"),
        Backend("reference", reference.fp8_linear),
    ],
    fake=lambda x, weight, *options: x.new_empty((x.shape[0], weight.shape[0]), dtype=options[-1]),
    setup_context=setup_context,
    backward=backward,
)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activations: Literal["none", "dynamic"] = "none",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply by an FP8 weight that has one scale for each of its rows.

    y = x @ (weight * scale[:, None])^T + bias. With ``activations="dynamic"`` each row of x is first rounded to the
    weight's format by `fp8_quantize`. Sums are float32, rounded once; on the CPU each row of y has the same bits
    whatever the other rows are. Differentiable in x and bias: dx = dy @ dequantised weight, straight through the
    rounding of x, so that adapters can be trained on a frozen FP8 base.

    Args:
        x: Activations, [..., K]; any float dtype.
        weight: Codes, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2`` [N, K].
        scale: Of each weight row, float32 [N].
        bias: [N], any float dtype.
        activations: "none" leaves x as it is (W8A16); "dynamic" rounds it (W8A8).
        out_dtype: Dtype of the result; that of ``x`` by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., N] of ``out_dtype``. A row of x with a NaN or an infinity gives no finite number with "dynamic".

    Raises:
        ValueError: shapes do not fit, or ``activations`` is unknown.
        TypeError: ``weight`` is not FP8, ``scale`` not float32, or ``x`` or ``bias`` not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.
    """
    args = (x, weight, scale, bias, activations, out_dtype or x.dtype)
    check(*args)
    return over_rows(OP, *args, backend=backend)
