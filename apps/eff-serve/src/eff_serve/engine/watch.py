"""Where a sequence looks in its picture while it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from eff_kernels.edit.attention import rows
from torch import Tensor

if TYPE_CHECKING:
    from eff_kernels.edit.attention import AttentionCall, AttentionOutput


class PictureWatch:
    """Fills while one sequence runs; read it when the sequence has ended.

    Args:
        layers: Decoder layers to look at; negative numbers count from the last. None takes the six around 0.7 of the
            depth.
    """

    def __init__(self, layers: tuple[int, ...] | None = None) -> None:
        self.layers = layers
        self._places = torch.empty(0, dtype=torch.int64)
        self._seen: dict[int, list[Tensor]] = {}

    def begin(self, layers: tuple[int, ...], places: Tensor) -> None:
        """Forget all; ``layers`` of the decoder will be looked at, and the picture's tokens stand at ``places`` [N]."""
        self._places, self._seen = places, {layer: [] for layer in layers}

    def note(self, call: AttentionCall, output: AttentionOutput) -> None:
        """Keep what the last query of a call attends to."""
        assert call.layer is not None
        self._seen[call.layer].append(rows(call, [-1]).mean(1)[0, 0, self._places].float())

    @property
    def maps(self) -> Tensor:
        """Mean over heads of the weights of the query that chooses token t, float32 [T, layers, N]."""
        return torch.stack([torch.stack(seen) for seen in self._seen.values()], 1)
