"""What is known of the pictures in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from eff_attention.passes import Marks


class InformedTokens(NamedTuple):
    """Chosen tokens of sequences, bool [B, n] each.

    Attributes:
        local: Raised by alpha.
        summary: Raised by beta.
    """

    local: Tensor
    summary: Tensor


@dataclass(frozen=True)
class PictureState:
    """The chosen tokens of the prompts in a cache, as one layer knows them. Immutable.

    Attributes:
        local: bool [B, n].
        summary: bool [B, n].
        found: Whether there is any.
        gain: Factor of each head, float32 [B, H], if it was measured.
        marks: Of the keys.
    """

    local: Tensor
    summary: Tensor
    found: bool
    gain: Tensor | None
    marks: Marks

    def rows(self, at: Tensor) -> PictureState:
        """The state of other rows, by their numbers [B]."""
        gain = None if self.gain is None else self.gain[at]
        return PictureState(
            self.local[at], self.summary[at], self.found, gain, Marks(self.marks.bits[at], self.marks.start)
        )
