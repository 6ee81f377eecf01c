"""decode_attention in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, scale: float
) -> Tensor:
    """Output [B, H, D], sequence by sequence."""
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


def _first(cache: Tensor, sequence: int, length: int, block_table: Tensor | None) -> Tensor:
    """The first ``length`` rows [KV, length, D] of a sequence."""
    if block_table is None:
        return cache[sequence, :, :length]
    page = cache.size(2)
    pages = block_table[sequence, : -(-length // page)].long()
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]
