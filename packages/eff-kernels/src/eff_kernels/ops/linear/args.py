"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from eff_kernels.ops.common import check_float, check_linear


class Args(NamedTuple):
    """Of `linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, weight, bias = args
    check_linear(x, weight, bias)
    check_float(weight, "weight")
