"""fp4_linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.common import over_rows
from eff_kernels.ops.fp4_linear import cpu, reference
from eff_kernels.ops.fp4_linear.args import Args, check
from eff_kernels.ops.fp4_linear.autograd import backward, setup_context
from eff_kernels.ops.fp4_quantize.api import Format, ScaleRounding
from eff_kernels.ops.fp4_quantize.common import check_codes, check_global_scale

OP = Op(
    "fp4_linear",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.fp4_linear, cpu.reject),
        triton_backend("eff_kernels.ops.fp4_linear.triton"),
        Backend("reference", reference.fp4_linear),
    ],
    fake=lambda x, packed, *args: x.new_empty((x.shape[0], packed.shape[0]), dtype=args[-1]),
    setup_context=setup_context,
    backward=backward,
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
            each call, and a row's result depends on the other rows.
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
    input_global_scale = check_global_scale(input_global_scale, format, "input_global_scale")
    args = (
        x, packed, scale, global_scale, bias, input_global_scale, format, activations, scale_rounding,
        out_dtype or x.dtype,
    )  # fmt: skip
    check(*args)
    return over_rows(OP, *args, backend=backend)
