"""Settings of layer reuse at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

Selector = Literal["exact", "pooled", "hash"]
Phase = Literal["decode", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReuseConfig(Settings):
    """How many keys a reusing layer reads, and from which length on.

    Attributes:
        top_k: Keys that a reusing layer attends to, a multiple of ``block_size``.
        block_size: Keys of a block; whole blocks are chosen.
        shared_heads: Whether all key-value heads of a layer attend to the same blocks, those that are heaviest for them
            together. Else each chooses its own, and head h of a reusing layer takes what head h of its source chose.
        must_select: Blocks that are chosen always, counted from the first (0, 1, ...) or the last (-1, -2, ...) of a
            sequence. -1, which holds the current token, must be among them.
        min_seq_len: Sequences up to this length run dense attention, as if nothing had been applied.
        selector: How an anchor ranks blocks. "exact": by the attention weights; it then reads all keys and values.
            "pooled" (by the mean of a block's keys) and "hash" (by the signs of random projections, as the published
            code) rank from a small index, and the anchor itself attends to what it chose. Layers of kind "full" that
            others reuse are dense, and exact.
        phase: "decode", or "both" to read long prompts without padding by the policy too: 128 queries then share a
            choice, made by the means of queries and keys in anchors, which are dense.
    """

    top_k: int = 2048
    block_size: int = 128
    must_select: tuple[int, ...] = (0, -2, -1)
    min_seq_len: int = 2048
    shared_heads: bool = False
    selector: Selector = "exact"
    phase: Phase = "decode"

    def check(self) -> None:
        """See `Settings`."""
        check_blocks(self.top_k, self.block_size, len(set(self.must_select)), "must_select")
        if -1 not in self.must_select:
            raise ValueError(f"must_select={self.must_select} lacks -1, the block of the current token")
        if self.min_seq_len < self.top_k:
            raise ValueError(f"min_seq_len={self.min_seq_len} is less than top_k={self.top_k}; nothing would be saved")

    @property
    def num_blocks(self) -> int:
        """Blocks that a reusing layer attends to."""
        return self.top_k // self.block_size


def check_blocks(top_k: int, block_size: int, forced: int, of: str) -> None:
    """Refuse sizes that do not fit each other, or that leave no room for the blocks that are chosen always."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size}; a block holds at least one key")
    if top_k < block_size or top_k % block_size:
        raise ValueError(f"top_k={top_k} is not a multiple of block_size={block_size}")
    if top_k < block_size * forced:
        raise ValueError(f"top_k={top_k} has no room for the {forced} blocks of {of}, {block_size} keys each")
