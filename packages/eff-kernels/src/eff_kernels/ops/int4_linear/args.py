"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_linear, check_vector


class Args(NamedTuple):
    """Of `int4_linear`."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    out_dtype: torch.dtype


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, weight, scale, bias, input_scale, _ = args
    check_linear(x, weight, bias, packed=weight.dtype is torch.uint8)
    check_vector(scale, "scale", weight.shape[0])
    if input_scale is not None:
        check_vector(input_scale, "input_scale", x.shape[-1])
    for name, factor in (("scale", scale), ("input_scale", input_scale)):
        if factor is not None and factor.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, got {factor.dtype}")
