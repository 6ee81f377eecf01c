"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_linear, check_vector
from eff_kernels.ops.int8_quantize.args import check_threshold

GROUP_STEP = 32
"""Groups of activations are whole steps of the kernels."""

_ACTIVATIONS = ("dynamic", "none")


class Args(NamedTuple):
    """Of `int8_linear`."""

    x: Tensor
    weight: Tensor
    absmax: Tensor
    bias: Tensor | None
    threshold: float
    per_token_outliers: bool
    activation: str
    activation_group: int | None
    out_dtype: torch.dtype


class BackwardArgs(NamedTuple):
    """Of the backward of `int8_linear`."""

    grad: Tensor
    weight: Tensor
    absmax: Tensor
    dtype: torch.dtype


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, weight, absmax, bias, threshold, _, activation, activation_group, _ = args
    check_linear(x, weight, bias)
    if weight.dtype is not torch.int8:
        raise TypeError(f"weight must be int8, got {weight.dtype}")
    if absmax.dtype is not torch.float32:
        raise TypeError(f"absmax must be float32, got {absmax.dtype}")
    check_vector(absmax, "absmax", weight.shape[0])
    check_threshold(threshold)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be 'dynamic' or 'none', got {activation!r}")
    if activation_group is None:
        return
    if activation_group < 1 or activation_group % GROUP_STEP:
        raise ValueError(
            f"activation_group must be a positive multiple of {GROUP_STEP} or None, got {activation_group}"
        )
    if activation == "none":
        raise ValueError(f"activation_group={activation_group} with activation='none', which has no scales")
