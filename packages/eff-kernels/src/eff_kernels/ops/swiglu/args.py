"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Args(NamedTuple):
    """Of `swiglu`."""

    gate: Tensor
    up: Tensor


class BackwardArgs(NamedTuple):
    """Of the backward of `swiglu`."""

    grad: Tensor
    gate: Tensor
    up: Tensor


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    gate, up = args
    shape = gate.shape
    if not shape or shape != up.shape:
        raise ValueError(f"gate and up must have one shape [..., d], got {list(shape)} and {list(up.shape)}")
    if not gate.dtype.is_floating_point or gate.dtype != up.dtype:
        raise TypeError(f"gate and up must have one float dtype, got {gate.dtype} and {up.dtype}")
