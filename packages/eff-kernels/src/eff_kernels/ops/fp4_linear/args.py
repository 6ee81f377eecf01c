"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_linear
from eff_kernels.ops.fp4_quantize.common import check_scale_rounding

_ACTIVATIONS = ("none", "dynamic")


class Args(NamedTuple):
    """Of `fp4_linear`."""

    x: Tensor
    packed: Tensor
    scale: Tensor
    global_scale: Tensor | None
    bias: Tensor | None
    input_global_scale: Tensor | None
    format: str
    activations: str
    scale_rounding: str
    out_dtype: torch.dtype


class BackwardArgs(NamedTuple):
    """Of the backward of `fp4_linear`."""

    grad: Tensor
    packed: Tensor
    scale: Tensor
    global_scale: Tensor | None
    format: str
    dtype: torch.dtype


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit; the codes of the weight are checked apart."""
    x, packed, _, _, bias, input_global_scale, format, activations, scale_rounding, _ = args
    check_linear(x, packed, bias, packed=True)
    if activations not in _ACTIVATIONS:
        raise ValueError(f"activations must be 'none' or 'dynamic', got {activations!r}")
    if activations == "none" and (input_global_scale is not None or scale_rounding != "floor"):
        raise ValueError("input_global_scale and scale_rounding are for activations='dynamic'")
    check_scale_rounding(scale_rounding, format)
