"""fp4_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.fp4_linear import cpu, reference
from eff_kernels.ops.fp4_linear.backward import BACKWARD_OP
from eff_kernels.ops.fp4_quantize.api import (
    Format,
    ScaleRounding,
    check_codes,
    check_global_scale,
    check_scale_rounding,
)
from eff_kernels.ops.int8_quantize.api import check_float

_ACTIVATIONS = ("none", "dynamic")


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, global_scale, bias = inputs[:5]
    ctx.save_for_backward(packed, scale, global_scale)
    ctx.x_dtype, ctx.bias_dtype, ctx.format = x.dtype, None if bias is None else bias.dtype, inputs[6]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad = grad.contiguous()
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = BACKWARD_OP(grad, *ctx.saved_tensors, ctx.format, ctx.x_dtype, backend=ctx.backend)
    if ctx.needs_input_grad[4]:
        dbias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
    return dx, None, None, None, dbias, None, None, None, None, None


OP = Op(
    "fp4_linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? global_scale, Tensor? bias, Tensor? input_global_scale, "
    "str format, str activations, str scale_rounding, ScalarType out_dtype) -> Tensor",
    [
        Backend("cpu", cpu.fp4_linear, cpu.reject),
        triton_backend("eff_kernels.ops.fp4_linear.triton"),
        Backend("reference", reference.fp4_linear),
    ],
    fake=lambda x, packed, *args: x.new_empty((x.shape[0], packed.shape[0]), dtype=args[-1]),
    setup_context=_remember,
    backward=_backward,
)


def fp4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    format: Format,
    activations: Literal["none", "dynamic"] = "none",
    input_global_scale: Tensor | None = None,
    scale_rounding: ScaleRounding = "floor",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply by a weight in packed 4-bit floats, which is never unpacked as a whole.

    y = x @ W^T + bias, W = code * scale * global_scale (see `fp4_quantize`). Sums are float32, rounded once.
    Differentiable in x and bias: dx = dy @ W, so that adapters can be trained on a frozen base.

    Args:
        x: Activations, [..., K]; any float dtype.
        packed: Codes of the weight, uint8 [N, K/2], the even index in the low half of a byte.
        scale: nvfp4: float8_e4m3fn [N, K/16]; mxfp4: uint8 [N, K/32].
        global_scale: nvfp4: s_g, one float32 number; mxfp4: None.
        bias: [N], any float dtype.
        format: "nvfp4" or "mxfp4".
        activations: "none" takes x as it is (W4A16); "dynamic" rounds x to the same format first (W4A4). The gradient
            passes through that rounding unchanged.
        input_global_scale: For nvfp4 and "dynamic", s_g of x, from calibration. Without it s_g comes from all of x at
            each call, and a row's result depends on the rows beside it.
        scale_rounding: For mxfp4 and "dynamic", as in `fp4_quantize`.
        out_dtype: Dtype of the result; that of ``x`` by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., N] of ``out_dtype``. A NaN among the scales of a weight row gives NaN in that output.

    Raises:
        ValueError: shapes do not fit, an unknown format or option, or an option that the others leave without use.
        TypeError: a tensor of another dtype than the format's.
        BackendError: the named backend cannot run this call; the message says why.
    """
    global_scale = check_codes(packed, scale, global_scale, format)
    shape, stored = x.shape, packed.shape
    if len(stored) != 2 or not shape or shape[-1] != 2 * stored[1]:
        raise ValueError(f"x [..., K] and packed [N, K/2] do not fit: got {list(shape)} and {list(stored)}")
    n = stored[0]
    check_float(x)
    if bias is not None:
        check_float(bias)
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape [{n}], got {list(bias.shape)}")
    if activations not in _ACTIVATIONS:
        raise ValueError(f"activations must be 'none' or 'dynamic', got {activations!r}")
    if activations == "none" and (input_global_scale is not None or scale_rounding != "floor"):
        raise ValueError("input_global_scale and scale_rounding are for activations='dynamic'")
    check_scale_rounding(scale_rounding, format)
    input_global_scale = check_global_scale(input_global_scale, format, "input_global_scale")
    arguments = (
        packed, scale, global_scale, bias, input_global_scale, format, activations, scale_rounding,
        out_dtype or x.dtype,
    )  # fmt: skip
    if len(shape) == 2:
        return OP(x, *arguments, backend=backend)
    rows = x.reshape(shape[:-1].numel(), shape[-1])
    return OP(rows, *arguments, backend=backend).view(*shape[:-1], n)
