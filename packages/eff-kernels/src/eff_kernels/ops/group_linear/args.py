"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Args(NamedTuple):
    """Of `group_linear`."""

    x: Tensor
    packed: Tensor
    bias: Tensor | None
    n: int
    bits: int
    offset: int
    minima: bool
    wide: bool
    out_dtype: torch.dtype
