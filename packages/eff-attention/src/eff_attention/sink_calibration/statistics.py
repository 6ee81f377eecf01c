"""How many sinks were found while a model ran, and how much weight they had."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from eff_kernels.edit.attention import AttentionCall
from torch import Tensor


class HeadSinks(NamedTuple):
    """What one head met.

    Attributes:
        layer: Its layer.
        head: Its number among the query heads.
        passes: Sequences times passes in which sinks were looked for.
        sinks: Sinks in each of them, on average.
        mass: Weight that a query gave them before calibration, on average over the queries that were looked at.
    """

    layer: int
    head: int
    passes: int
    sinks: float
    mass: float


class _Sums:
    """Of one layer: sequences times passes, queries, and sinks and their weight by head, float64 [h]."""

    def __init__(self, count: Tensor) -> None:
        self.passes, self.queries = 0, 0
        self.count, self.mass = (torch.zeros_like(count, dtype=torch.float64) for _ in range(2))


class SinkCounts:
    """Sums over all passes of a model, from all its threads. Copies and pickles begin with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[int, tuple[int, ...]], _Sums] = {}

    def note(
        self, call: AttentionCall, heads: tuple[int, ...], batch: int, count: Tensor, mass: Tensor | None, queries: int
    ) -> None:
        """Add a call, unless it is a recomputation of gradient checkpointing.

        Args:
            call: The call.
            heads: Heads that were looked at.
            batch: Sequences.
            count: Sinks of all sequences, by head [h].
            mass: Weight that all these queries gave them [h]; None where sinks were kept from before.
            queries: Queries that are no padding, of all sequences.
        """
        if call.recomputed:
            return
        key = call.layer or 0, heads
        with self._lock:
            held = self._sums.get(key)
            if held is None:
                held = self._sums[key] = _Sums(count)
            held.passes += batch
            held.count += count.to(held.count.device)
            if mass is not None:
                held.queries += queries
                held.mass += mass.to(held.mass.device)

    def heads(self) -> list[HeadSinks]:
        """What each head met, in the order of layers and heads."""
        found = []
        with self._lock:
            for (layer, heads), held in sorted(self._sums.items(), key=lambda item: item[0]):
                for head, count, mass in zip(heads, held.count.tolist(), held.mass.tolist(), strict=True):
                    mean, share = count / held.passes, mass / max(held.queries, 1)
                    found.append(HeadSinks(layer, head, held.passes, mean, share))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return SinkCounts, ()
