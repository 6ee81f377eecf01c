"""decode_attention in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, run: int, scale: float
) -> Tensor:
    """Output [B, H, D], sequence by sequence."""
    return scored_decode_attention(q, k, v, lengths, block_table, run, 1, scale)[0]


def scored_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    run: int,
    score_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same, and the weights summed over a group's queries and over blocks of keys, float32 [B, KV, blocks]."""
    check_cache(k, lengths, block_table, run)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mass = q.new_zeros(q.size(0), k.size(1), num_blocks(k, block_table, run, score_block), dtype=wide)
    group = q.size(1) // k.size(1)
    for b, length in enumerate(lengths.tolist()):
        if length:
            keys, values = (_first(cache, b, length, block_table, run).to(wide) for cache in (k, v))
            q_KGD = q[b].to(wide).unflatten(0, (k.size(1), group))
            weights_KGS = torch.softmax(scale * q_KGD @ keys.transpose(1, 2), -1)
            out[b] = (weights_KGS @ values).flatten(0, 1).to(q.dtype)
            block_S = torch.arange(length, device=q.device) // score_block
            mass[b].index_add_(1, block_S, weights_KGS.sum(1))
    return out, mass


def room(k: Tensor, block_table: Tensor | None, run: int) -> int:
    """Most keys that a sequence can have."""
    return k.size(2) if block_table is None else (run or k.size(2)) * block_table.size(-1)


def num_blocks(k: Tensor, block_table: Tensor | None, run: int, score_block: int) -> int:
    """Blocks of ``score_block`` keys that a sequence can have."""
    return -(-room(k, block_table, run) // score_block)


def check_cache(k: Tensor, lengths: Tensor, block_table: Tensor | None, run: int) -> None:
    """Refuse what would read outside the cache.

    Raises:
        ValueError: a length, a page number or the first row of a run lies outside.
    """
    counts, most = lengths.tolist(), room(k, block_table, run)
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


def _first(cache: Tensor, sequence: int, length: int, block_table: Tensor | None, run: int) -> Tensor:
    """The first ``length`` rows [KV, length, D] of a sequence."""
    if block_table is None:
        return cache[sequence, :, :length]
    keys = run or cache.size(2)
    entry_KN = block_table[sequence].long().expand(cache.size(1), -1)
    at_S = torch.arange(length, device=cache.device)
    entry_KS, within_S = entry_KN[:, at_S // keys], at_S % keys
    head_K = torch.arange(cache.size(1), device=cache.device)[:, None]
    return cache[sequence, head_K, entry_KS + within_S] if run else cache[entry_KS, head_K, within_S]
