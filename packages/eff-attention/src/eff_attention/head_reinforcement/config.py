"""Settings of vision-aware head reinforcement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class VHRConfig(Settings):
    """How much chosen heads are strengthened, in which layers, and how they are chosen.

    Attributes:
        alpha: Factor of the output of chosen heads; at 1 nothing changes.
        layers: Layers to treat; "auto" takes the last 44 %, which are the paper's for LLaVA (18 to 31 of 32).
        include_second_layer: Whether "auto" takes the second layer as well, as the paper does for captions; on some
            benchmarks it is unstable (appendix C).
        outlier_filter: Whether heads that grow when the picture goes away are left out (eq. 6).
        reference: What is compared: "plain", the model without picture and without strengthened heads; "lockstep", in
            which both sides get the same strengthened heads, at the price of a further pass over the prompt.
        metric: "absolute" is the paper's distance; "relative" divides it by the norm of the output without picture.
    """

    alpha: float = 2.0
    layers: Literal["auto"] | tuple[int, ...] = "auto"
    include_second_layer: bool = True
    outlier_filter: bool = True
    reference: Literal["plain", "lockstep"] = "plain"
    metric: Literal["absolute", "relative"] = "absolute"

    def check(self) -> None:
        """See `Settings`."""
        if not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}; use a finite number of 0 or more")
        if self.layers != "auto" and not self.layers:
            raise ValueError("layers is empty; name some, or use 'auto'")

    def chosen(self, count: int) -> tuple[int, ...]:
        """Layers to treat of ``count``.

        Raises:
            ValueError: a layer does not exist.
        """
        if self.layers == "auto":
            last = range(count - max(1, round(0.44 * count)), count)
            return tuple(sorted({*last, *([1] if self.include_second_layer and count > 1 else [])}))
        found = tuple(sorted(set(self.layers)))
        if not 0 <= found[0] <= found[-1] < count:
            raise ValueError(f"layers={self.layers}; the model has 0..{count - 1}")
        return found
