"""Which blocks of keys a sequence attends to, from the weight that each block got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eff_attention.layer_reuse.blocks import largest
from eff_attention.layer_reuse.config import LayerReuseConfig


class SelectedBlocks(NamedTuple):
    """The blocks of each sequence and key-value head.

    Attributes:
        blocks: Their numbers in ascending order, int64 [B, KV, W]; a sequence that has fewer than W ends with numbers
            that mean nothing.
        lengths: Keys in the blocks of each sequence, int32 [B]: all blocks are full but the last of a sequence.
    """

    blocks: Tensor
    lengths: Tensor


def select_blocks(mass: Tensor, lengths: Sequence[int], config: LayerReuseConfig) -> SelectedBlocks:
    """Take the heaviest blocks of each sequence and key-value head, and those of ``must_select``.

    Of equal blocks the earlier is taken. A sequence of up to ``min_seq_len`` keys keeps all its blocks, whatever else
    is in the batch.

    Args:
        mass: Weight of each block, [B, KV, N]; what lies beyond the length of a sequence does not count.
        lengths: Keys of each sequence, at least 1.
        config: Size and number of the blocks.
    """
    size = config.block_size
    blocks = [-(-n // size) for n in lengths]
    counts = [n if length <= config.min_seq_len else min(n, config.num_blocks)
              for n, length in zip(blocks, lengths, strict=True)]  # fmt: skip
    width, kv_heads = max(counts), mass.size(1)
    if min(counts) == max(blocks):
        index = torch.arange(width, device=mass.device).expand(*mass.shape[:2], -1)
    else:
        score = mass.sum(1, keepdim=True) if config.shared_heads else mass.clone()
        for row, number in enumerate(blocks):
            score[row, :, number:] = -1.0
            forced = (m if m >= 0 else number + m for m in config.must_select)
            score[row, :, [m for m in forced if 0 <= m < number]] = torch.inf
        index = largest(score, width)
        for row, number in enumerate(counts):
            if number < width:
                index[row, :, number:] = mass.size(2)
        index = index.sort(-1).values.expand(-1, kv_heads, -1)
    kept = [(c - 1) * size + n - (b - 1) * size for c, b, n in zip(counts, blocks, lengths, strict=True)]
    return SelectedBlocks(index, torch.tensor(kept, dtype=torch.int32, device=mass.device))
