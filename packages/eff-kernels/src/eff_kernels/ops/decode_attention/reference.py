"""decode_attention in plain PyTorch: the readable truth, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.decode_attention.args import Args, ScoredArgs
from eff_kernels.ops.decode_attention.common import check_cache, num_blocks


def decode_attention(*args: *Args) -> Tensor:
    """Output [B, H, D], sequence by sequence."""
    q, k, v, lengths, block_table, run, scale = args
    return scored_decode_attention(q, k, v, lengths, block_table, run, 1, scale)[0]


def scored_decode_attention(*args: *ScoredArgs) -> tuple[Tensor, Tensor]:
    """The same, and the weights summed over a group's queries and over blocks of keys, float32 [B, KV, blocks]."""
    q, k, v, lengths, block_table, run, score_block, scale = args
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
