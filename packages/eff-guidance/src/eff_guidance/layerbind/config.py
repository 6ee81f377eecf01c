"""Settings of LayerBind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

# Blocks in which the picture listens to its text most, for 57 blocks of FLUX.1 and 38 of SD3.5-Large.
FLUX_BLOCKS = (0, 15, 18, 42, 45, 48, 50, 53, 54)
SD3_BLOCKS = (0, 11, 14, 19, 21, 24, 29, 32, 34)
_FLUX_LAST, _SD3_LAST = 56, 37


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBindConfig(Settings):
    """How layers are bound to their regions.

    Attributes:
        eta1: Share of the steps in which each layer is made in a branch of its own, 0 to 1.
        eta2: Share of the steps after which the picture is left alone, ``eta1`` to 1.
        opacity: Weight of a layer's own attention between the two, 0 to 1.
        hard_blocks: Blocks in which a branch sees nothing but its own words; "auto" takes those of the paper, scaled
            to the depth of the model. FLUX's single blocks are counted on after its double blocks.
        reverse_adaptation: Whether in these blocks the background sees the branches around it.
        alpha_mode: How a layer is put over an earlier one: "estimate" finds its outline, "direct" pastes the region.
        core_component: Whether of an outline only the part that lies in the middle of the box is kept; regions given
            as masks are left as they are.
        gamma: Exponent of the outline's score.
        poisson_lambda: How close the smoothed outline keeps to the score.
        own_pooled: Whether a branch is modulated by the pooled vector of its own prompt, or by that of the background.
    """

    eta1: float = 0.2
    eta2: float = 0.7
    opacity: float = 0.7
    hard_blocks: Literal["auto"] | tuple[int, ...] = "auto"
    reverse_adaptation: bool = True
    alpha_mode: Literal["estimate", "direct"] = "estimate"
    core_component: bool = True
    gamma: float = 0.9
    poisson_lambda: float = 0.5
    own_pooled: bool = True

    def check(self) -> None:
        """Refuse what lies outside of its range."""
        for name in ("eta1", "eta2", "opacity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 0 to 1")
        if self.eta1 > self.eta2:
            raise ValueError(f"eta1={self.eta1} is above eta2={self.eta2}; branches end before nursing does")
        for name in ("gamma", "poisson_lambda"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)}; use a number above 0")
        if self.hard_blocks != "auto" and any(b < 0 for b in self.hard_blocks):
            raise ValueError(f"hard_blocks={self.hard_blocks}; blocks are counted from 0")

    def switches(self, steps: int) -> tuple[int, int]:
        """First step without branches, and first step without nursing, of so many steps."""
        first = math.ceil(round(self.eta1 * steps, 9))
        return first, max(first, math.ceil(round(self.eta2 * steps, 9)))

    def blocks_of(self, depth: int, *, flux: bool) -> frozenset[int]:
        """The hard-binding blocks of a model with so many blocks.

        Raises:
            ValueError: a block does not exist.
        """
        if self.hard_blocks == "auto":
            known, last = (FLUX_BLOCKS, _FLUX_LAST) if flux else (SD3_BLOCKS, _SD3_LAST)
            return frozenset(scale_blocks(known, last, depth))
        if unknown := [b for b in self.hard_blocks if b >= depth]:
            raise ValueError(
                f"hard_blocks={self.hard_blocks}: the model has no block {unknown}; it has 0 to {depth - 1}"
            )
        return frozenset(self.hard_blocks)


def scale_blocks(blocks: Sequence[int], last: int, depth: int) -> list[int]:
    """Blocks of a model whose last block is ``last`` at the same relative depth of one with ``depth`` blocks."""
    return sorted({round(b * (depth - 1) / last) for b in blocks})
