"""Fake quantisation: round to FP4 and back in one step, with a gradient that passes straight through."""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels import fp4_dequantize, fp4_quantize
from torch import Tensor

from eff_quant.fp4.config import Format, ScaleRounding


def fake_fp4(
    x: Tensor,
    format: Format = "nvfp4",
    *,
    scale_rounding: ScaleRounding = "floor",
    global_scale: Tensor | None = None,
    clip_grad: bool = False,
) -> Tensor:
    """Round x to the values that FP4 can hold; the gradient is that of the identity.

    Args:
        x: Numbers in blocks along the last axis, [..., K].
        format: ``"nvfp4"`` or ``"mxfp4"``.
        scale_rounding: As in `FP4Config`; mxfp4 only.
        global_scale: The tensor scale of nvfp4 (it multiplies codes); by default that of x's largest magnitude.
        clip_grad: Let no gradient through where x is cut off: at 7 times the block's scale or more, which would round
            to 8 if the largest value were not 6.

    Returns:
        Tensor like ``x``, computed in float32 and cast back.

    Raises:
        ValueError: K is not a multiple of the block, or an unknown format or rounding.
    """
    return _FakeFP4.apply(x, format, scale_rounding, global_scale, clip_grad)


class _FakeFP4(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, format: Format, scale_rounding: ScaleRounding, global_scale: Tensor | None, clip_grad: bool
    ) -> Tensor:
        codes = fp4_quantize(x.detach(), format, scale_rounding=scale_rounding, global_scale=global_scale)
        if clip_grad:
            unit = fp4_dequantize(codes._replace(packed=torch.full_like(codes.packed, 0x22)), format)  # 2 encodes 1
            ctx.save_for_backward(x.detach().abs() < 7 * unit)
        return fp4_dequantize(codes, format, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        for kept in ctx.saved_tensors:
            grad = grad.masked_fill(~kept, 0)
        return grad, None, None, None, None
