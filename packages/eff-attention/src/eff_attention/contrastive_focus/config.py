"""Settings of CARVE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class CarveConfig(Settings):
    """Settings; the defaults are the paper's where paper and code agree.

    Attributes:
        layers: Decoder layers to read; None takes the six around 0.7 of the depth.
        general: The request that shows where the model looks whatever is asked.
        suffix: Added to the question and to the general request, as in the official code.
        max_new_tokens: Longest recorded answer.
        lam: Added to the general map before the division; 1e-8 in the code, 0.05 in the paper's appendix.
        time: Which generated tokens count: all, weighted by their number, the first or the last.
        top_p: Share of pixels that pass the threshold.
        max_regions: Regions that are kept.
        rank: Order of the regions: by the sum of their score or by area.
        outside: What becomes of pixels within the crop that no region holds: "black", or "kept" as they are.
        ratio: "free" crops to the regions, whatever shape they have; "picture" grows the crop to the picture's ratio,
            for models that squeeze all pictures into one shape.
        final: Whether the answer is asked about the refined picture, or about both, the original first.
    """

    layers: tuple[int, ...] | None = None
    general: str = "Write a general description of the image."
    suffix: str = " Answer the question using a single word or phrase."
    max_new_tokens: int = 32
    lam: float = 1e-8
    time: Literal["all", "first", "last"] = "all"
    top_p: float = 0.2
    max_regions: int = 3
    rank: Literal["score", "area"] = "score"
    outside: Literal["black", "kept"] = "black"
    ratio: Literal["free", "picture"] = "free"
    final: Literal["refined", "both"] = "both"

    def check(self) -> None:
        """Values are in their ranges."""
        if not self.lam >= 0:
            raise ValueError(f"lam must not be negative, got {self.lam}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_regions < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"max_regions and max_new_tokens must be 1 or more, got {self.max_regions}, {self.max_new_tokens}"
            )
