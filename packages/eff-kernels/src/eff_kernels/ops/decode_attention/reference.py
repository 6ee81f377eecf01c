"""decode_attention in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, scale: float
) -> Tensor:
    """Output [B, H, D], sequence by sequence."""
    check_cache(k, lengths, block_table)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.size(1) // k.size(1)
    for b, length in enumerate(lengths.tolist()):
        if length:
            keys, values = (_first(cache, b, length, block_table).to(wide) for cache in (k, v))
            q_KGD = q[b].to(wide).unflatten(0, (k.size(1), group))
            weights_KGS = torch.softmax(scale * q_KGD @ keys.transpose(1, 2), -1)
            out[b] = (weights_KGS @ values).flatten(0, 1).to(q.dtype)
    return out


def check_cache(k: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Refuse what would read outside the cache.

    Raises:
        ValueError: a length or a page number lies outside.
    """
    page = k.size(2)
    counts = lengths.tolist()
    room = page if block_table is None else page * block_table.size(1)
    for b, length in enumerate(counts):
        if not 0 <= length <= room:
            raise ValueError(f"lengths must lie between 0 and {room}, got {length} for sequence {b}")
    if block_table is not None:
        for b, (length, pages) in enumerate(zip(counts, block_table.tolist(), strict=True)):
            used = pages[: -(-length // page)]
            if used and (min(used) < 0 or max(used) >= k.size(0)):
                raise ValueError(f"block_table of sequence {b} names pages outside 0..{k.size(0) - 1}: {used}")


def _first(cache: Tensor, sequence: int, length: int, block_table: Tensor | None) -> Tensor:
    """The first ``length`` rows [KV, length, D] of a sequence."""
    if block_table is None:
        return cache[sequence, :, :length]
    page = cache.size(2)
    pages = block_table[sequence, : -(-length // page)].long()
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]
