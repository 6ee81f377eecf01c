"""What is known of the keys in a cache: the weight that each got so far. It is kept with the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eff_attention.passes import key_bits

ATTRIBUTE = "_eff_sink_calibration"  # of a cache


@dataclass(frozen=True)
class SinkState:
    """What the treated heads of one layer gave to the keys so far. Immutable: each pass makes a new one.

    Attributes:
        heads: The heads.
        sums: Weight that each key got from all queries, before calibration, float32 [B, h, n].
        rows: Queries that could see it, int64 [B, n].
        sinks: Sinks after the last pass, bool [B, h, n].
        marks: A few bits of keys, int64 [B, m]: by them rows are found again that the host put in another order.
    """

    heads: tuple[int, ...]
    sums: Tensor
    rows: Tensor
    sinks: Tensor
    marks: Tensor

    @property
    def length(self) -> int:
        """Tokens that it knows of."""
        return self.sums.shape[-1]

    def followed(self, key: Tensor, position: int, name: str) -> SinkState:
        """The state of the rows that the cache now has: the host may have reordered, repeated or dropped some.

        A single row stays the same one, and its keys are not looked at.

        Args:
            key: Keys with those of the cache, [B, KV, S, D].
            position: Tokens in the cache before this pass.
            name: Of the layer, for errors.

        Raises:
            NotImplementedError: the cache was cut, and with it went queries that the sums hold.
            RuntimeError: a row of the cache is none that was there.
        """
        if self.length > position:
            raise NotImplementedError(
                f"{name}: the cache holds {position} tokens, sinks are known of {self.length}; sums of weights cannot "
                "be cut. Use decode='prefill_sinks' where tokens are taken back after a prompt, or a copy of the cache"
            )
        if key.shape[0] == self.marks.shape[0] == 1:
            return self
        now = key_bits(key[:, :, : self.marks.shape[-1]])
        if torch.equal(now, self.marks):
            return self
        same = (now[:, None] == self.marks).all(-1)
        if not bool(same.any(1).all()):
            raise RuntimeError(f"{name}: the cache holds other keys than those whose sinks are known")
        at = same.int().argmax(1)
        return SinkState(self.heads, self.sums[at], self.rows[at], self.sinks[at], self.marks[at])

    def marks_with(self, key: Tensor, length: int) -> Tensor:
        """Marks of the first ``length`` keys. A single row needs none of those that came after its first pass."""
        if key.shape[0] == 1:
            return self.marks
        return torch.cat([self.marks, key_bits(key[:, :, self.marks.shape[-1] : length])], 1)
