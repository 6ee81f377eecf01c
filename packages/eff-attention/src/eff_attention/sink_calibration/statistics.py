"""How many sinks were found while a model ran, and how much weight they had."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from eff_kernels.edit.attention import AttentionCall
from torch import Tensor

from eff_attention.sink_calibration.measure import Seen


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


class SinkCounts:
    """Sums over all passes of a model, from all its threads. Copies and pickles begin with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def note(self, call: AttentionCall, heads: tuple[int, ...], sinks: Tensor, seen: Seen | None, real: Tensor) -> None:
        """Add a call, unless it is a recomputation of gradient checkpointing.

        Args:
            call: The call.
            heads: Heads that were looked at.
            sinks: bool [B, h, n].
            seen: What was looked at; None where sinks were kept from before.
            real: Queries that are no padding, bool [B, Sq].
        """
        if call.recomputed:
            return
        count = sinks.sum((0, 2)).double()
        passes = torch.full_like(count, sinks.shape[0])
        mass, queries = torch.zeros_like(count), torch.zeros_like(count)
        if seen is not None:
            mass = torch.where(sinks, seen.sums[..., : sinks.shape[-1]], 0.0).sum((0, 2)).double()
            queries = queries + real.sum()
        new = torch.stack([passes, count, mass, queries])
        key = call.layer or 0, heads
        with self._lock:
            held = self._sums.get(key)
            self._sums[key] = new if held is None else held + new.to(held.device)

    def heads(self) -> list[HeadSinks]:
        """What each head met, in the order of layers and heads."""
        with self._lock:
            held = dict(self._sums)
        found = []
        for (layer, heads), sums in sorted(held.items(), key=lambda item: item[0]):
            for head, (passes, sinks, mass, queries) in zip(heads, sums.T.tolist(), strict=True):
                found.append(HeadSinks(layer, head, int(passes), sinks / passes, mass / max(queries, 1.0)))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return SinkCounts, ()
