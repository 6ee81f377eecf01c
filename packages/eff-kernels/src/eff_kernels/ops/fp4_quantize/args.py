"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Args(NamedTuple):
    """Of `fp4_quantize`."""

    x: Tensor
    global_scale: Tensor | None
    format: str
    scale_rounding: str


class DequantizeArgs(NamedTuple):
    """Of `fp4_dequantize`."""

    packed: Tensor
    scale: Tensor
    global_scale: Tensor | None
    format: str
    dtype: torch.dtype
