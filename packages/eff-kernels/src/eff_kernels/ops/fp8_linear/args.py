"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_linear, check_vector
from eff_kernels.ops.fp8_quantize.common import check_fp8

_ACTIVATIONS = ("none", "dynamic")


class Args(NamedTuple):
    """Of `fp8_linear`."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    activations: str
    out_dtype: torch.dtype


class BackwardArgs(NamedTuple):
    """Of the backward of `fp8_linear`."""

    grad: Tensor
    weight: Tensor
    scale: Tensor
    dtype: torch.dtype


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, weight, scale, bias, activations, _ = args
    check_linear(x, weight, bias)
    check_fp8("weight", weight.dtype)
    if scale.dtype is not torch.float32:
        raise TypeError(f"scale must be float32, got {scale.dtype}")
    check_vector(scale, "scale", weight.shape[0])
    if activations not in _ACTIVATIONS:
        raise ValueError(f"activations must be 'none' or 'dynamic', got {activations!r}")
