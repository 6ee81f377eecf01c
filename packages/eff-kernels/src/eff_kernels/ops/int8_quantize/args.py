"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from eff_kernels.ops.common import check_rows


class Args(NamedTuple):
    """Of `int8_quantize_rows` and `int8_quantize_columns`."""

    x: Tensor
    threshold: float


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    x, threshold = args
    check_threshold(threshold)
    check_rows(x)


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless the threshold is a number from 0 to infinity."""
    if not threshold >= 0:  # also true of NaN
        raise ValueError(f"threshold must be 0 (no outliers) or positive, got {threshold}")
