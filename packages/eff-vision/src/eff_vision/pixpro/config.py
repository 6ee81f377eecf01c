"""Settings of PixPro and PixContrast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class PixProConfig(Settings):
    """Settings; the defaults are the paper's for ResNet-50.

    Attributes:
        loss: "pixpro" (agreement after propagation) or "pixcontrast" (InfoNCE over cells, temperature ``tau``).
        dim: Features of a projected cell.
        hidden: Width inside the projector.
        gamma: Sharpness of the propagation.
        transform_layers: Convolutions of the propagation's transform, 0 to 2.
        threshold: Cells are positives when nearer than this many cell diagonals.
        tau: Temperature of PixContrast.
        instance_weight: Weight of the image-level branch (BYOL's loss); 0 leaves it out.
        momentum: Of the copy at the beginning; rises to 1 by a cosine.
    """

    loss: Literal["pixpro", "pixcontrast"] = "pixpro"
    dim: int = 256
    hidden: int = 4096
    gamma: float = 2.0
    transform_layers: int = 1
    threshold: float = 0.7
    tau: float = 0.3
    instance_weight: float = 0.0
    momentum: float = 0.99

    def check(self) -> None:
        """Values are in their ranges."""
        if self.dim < 1 or self.hidden < 1:
            raise ValueError(f"dim and hidden must be 1 or more, got {self.dim} and {self.hidden}")
        for name in ("gamma", "threshold", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.transform_layers <= 2:
            raise ValueError(f"transform_layers must be 0, 1 or 2, got {self.transform_layers}")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {self.momentum}")
        if not self.instance_weight >= 0:
            raise ValueError(f"instance_weight must not be negative, got {self.instance_weight}")
