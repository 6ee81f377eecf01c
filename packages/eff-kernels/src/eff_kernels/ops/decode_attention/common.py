"""Sizes of a cache, and the check of what would be read."""

from __future__ import annotations

from torch import Tensor


def max_keys(k: Tensor, block_table: Tensor | None, run: int) -> int:
    """Most keys that a sequence can have."""
    return k.size(2) if block_table is None else (run or k.size(2)) * block_table.size(-1)


def num_blocks(k: Tensor, block_table: Tensor | None, run: int, score_block: int) -> int:
    """Blocks of ``score_block`` keys that a sequence can have."""
    return -(-max_keys(k, block_table, run) // score_block)


def check_cache(k: Tensor, lengths: Tensor, block_table: Tensor | None, run: int) -> None:
    """Refuse what would read outside the cache.

    Raises:
        ValueError: a length, a page number or the first row of a run lies outside.
    """
    counts, most = lengths.tolist(), max_keys(k, block_table, run)
    for b, length in enumerate(counts):
        if not 0 <= length <= most:
            raise ValueError(f"lengths must lie between 0 and {most}, got {length} for sequence {b}")
    if block_table is None:
        return
    keys = run or k.size(2)
    for b, (length, entries) in enumerate(zip(counts, block_table.tolist(), strict=True)):
        for row in entries if block_table.dim() == 3 else [entries]:
            used = row[: -(-length // keys)]
            sizes = [min(keys, length - i * keys) for i in range(len(used))]
            if run and any(not 0 <= e <= k.size(2) - n for e, n in zip(used, sizes, strict=True)):
                raise ValueError(
                    f"block_table of sequence {b} has runs outside the {k.size(2)} rows of its cache: {used}"
                )
            if not run and used and (min(used) < 0 or max(used) >= k.size(0)):
                raise ValueError(f"block_table of sequence {b} names pages outside 0..{k.size(0) - 1}: {used}")
