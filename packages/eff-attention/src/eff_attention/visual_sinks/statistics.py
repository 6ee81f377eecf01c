"""How many sinks were found while a model ran, and how much attention moved."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LayerSinks(NamedTuple):
    """What one layer did.

    Attributes:
        layer: Its number.
        visual_sinks: Picture tokens that were sinks, for each prompt on average.
        text_sinks: Other tokens that were.
        heads: Share of pairs of head and treated query that were chosen.
        moved: Weight that a chosen head moved for a query, on average.
    """

    layer: int
    visual_sinks: float
    text_sinks: float
    heads: float
    moved: float


class VARCounts:
    """Sums over all passes of a model, from all its threads. Copies and pickles begin with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[int, Tensor] = {}

    def note_prompt(self, layer: int, visual: Tensor, text: Tensor) -> None:
        """Add the sinks of prompts, bool [B, n] each."""
        self._add(layer, [torch.tensor(float(len(visual))), visual.sum(), text.sum(), 0, 0, 0])

    def note_rows(self, layer: int, asked: Tensor, select: Tensor, moved: Tensor) -> None:
        """Add pairs of head and query: those treated [B, H, Q], those chosen, and the weight that moved."""
        self._add(layer, [0, 0, 0, asked.sum(), select.sum(), moved.sum()])

    def note_moved(self, layer: int, asked: int, moved: Tensor) -> None:
        """Add the number of treated pairs, and of each head how many were chosen and the weight, float64 [..., 2]."""
        chosen, weight = moved.reshape(-1, 2).sum(0)
        self._add(layer, [0, 0, 0, asked, chosen, weight])

    def _add(self, layer: int, numbers: list[Any]) -> None:
        kind = next(n for n in reversed(numbers) if isinstance(n, Tensor)).device
        new = torch.stack([torch.as_tensor(n, device=kind).detach().double() for n in numbers])
        with self._lock:
            held = self._sums.get(layer)
            self._sums[layer] = new if held is None else held.to(new.device) + new

    def layers(self) -> list[LayerSinks]:
        """What each layer did."""
        with self._lock:
            held = sorted(self._sums.items())
        found = []
        for layer, sums in held:
            prompts, visual, text, asked, chosen, moved = sums.tolist()
            found.append(
                LayerSinks(
                    layer,
                    visual / max(prompts, 1.0),
                    text / max(prompts, 1.0),
                    chosen / max(asked, 1.0),
                    moved / max(chosen, 1.0),
                )
            )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return VARCounts, ()
