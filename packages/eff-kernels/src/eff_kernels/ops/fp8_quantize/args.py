"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_rows
from eff_kernels.ops.fp8_quantize.common import check_fp8


class Args(NamedTuple):
    """Of `fp8_quantize`."""

    x: Tensor
    dtype: torch.dtype
    power_of_two: bool


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, dtype, _ = args
    check_rows(x)
    check_fp8("dtype", dtype)
