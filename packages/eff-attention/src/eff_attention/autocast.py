"""What autocast does to the arguments of attention, for attention that is not PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The arguments as ``scaled_dot_product_attention`` gets them under autocast: of one dtype, but for float64."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)
