"""fp8_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.fp8_linear import cpu, reference
from eff_kernels.ops.fp8_linear.backward import BACKWARD_OP
from eff_kernels.ops.fp8_quantize.api import check_fp8

_ACTIVATIONS = ("none", "dynamic")


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias = inputs[:4]
    ctx.save_for_backward(weight, scale)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, scale = ctx.saved_tensors
    grad = grad.contiguous()
    dx = BACKWARD_OP(grad, weight, scale, ctx.x_dtype, backend=ctx.backend) if ctx.needs_input_grad[0] else None
    dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None, None


OP = Op(
    "fp8_linear",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str activations, ScalarType out_dtype) -> Tensor",
    [
        Backend("cpu", cpu.fp8_linear, cpu.reject),
        triton_backend("eff_kernels.ops.fp8_linear.triton", run="fp8_linear"),
        Backend("reference", reference.fp8_linear),
    ],
    fake=lambda x, weight, scale, bias, activations, out_dtype: x.new_empty(
        (x.shape[0], weight.shape[0]), dtype=out_dtype
    ),
    setup_context=_remember,
    backward=_backward,
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
    whatever rows stand beside it. Differentiable in x and bias: dx = dy @ dequantised weight, straight through the
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
    shape, stored = x.shape, weight.shape
    if len(stored) != 2 or not shape or shape[-1] != stored[1]:
        raise ValueError(f"x [..., K] and weight [N, K] do not fit: got {list(shape)} and {list(stored)}")
    check_fp8("weight", weight.dtype)
    if scale.dtype is not torch.float32:
        raise TypeError(f"scale must be float32, got {scale.dtype}")
    n = stored[0]
    if scale.shape != (n,):
        raise ValueError(f"scale must have shape [{n}], got {list(scale.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must have shape [{n}], got {list(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must have a float dtype, got {tensor.dtype}")
    if activations not in _ACTIVATIONS:
        raise ValueError(f"activations must be 'none' or 'dynamic', got {activations!r}")
    arguments = (weight, scale, bias, activations, out_dtype or x.dtype)
    if len(shape) == 2:
        return OP(x, *arguments, backend=backend)
    return OP(x.reshape(shape[:-1].numel(), shape[-1]), *arguments, backend=backend).view(*shape[:-1], n)
