"""Where the changed output is written."""

from __future__ import annotations

import torch
from torch import Tensor


def copied(out: Tensor) -> Tensor:
    """The output in memory of its own, laid out alike, its features one after the other."""
    own = out.clone()
    return own if own.stride(3) == 1 else own.contiguous()


def like(out: Tensor) -> Tensor:
    """Memory for it that is not filled."""
    own = torch.empty_like(out)
    return own if own.stride(3) == 1 else own.contiguous()
