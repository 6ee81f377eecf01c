"""The residual unit of DPT's decoders (Ranftl and others, 2021)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualUnit(nn.Module):
    """Two convolutions behind rectifiers, and what came in.

    Args:
        convolution: Makes a convolution that keeps the shape of maps.
    """

    def __init__(self, convolution: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = convolution(), convolution()

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of the same shape."""
        return maps + self.second(F.relu(self.first(F.relu(maps))))
