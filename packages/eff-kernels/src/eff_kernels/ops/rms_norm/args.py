"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from eff_kernels.ops.common import check_float


class Args(NamedTuple):
    """Of `rms_norm`."""

    x: Tensor
    weight: Tensor
    eps: float


class AddArgs(NamedTuple):
    """Of `add_rms_norm`."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    eps: float


class BackwardArgs(NamedTuple):
    """Of the backward of `rms_norm`."""

    grad: Tensor
    x: Tensor
    weight: Tensor
    eps: float
    grad_residual: Tensor | None


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, weight, _ = args
    if not x.dim():
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must have shape [{x.size(-1)}] for x of shape {list(x.shape)}, got {list(weight.shape)}"
        )
    check_float(x)


def check_add(*args: *AddArgs) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, residual, weight, eps = args
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have one shape, got {list(x.shape)} and {list(residual.shape)}")
    if not x.dtype.is_floating_point or residual.dtype != x.dtype:
        raise TypeError(f"x and residual must have one float dtype, got {x.dtype} and {residual.dtype}")
    check(x, weight, eps)
