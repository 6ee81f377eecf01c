"""A whole prompt with layer reuse: blocks of queries share the blocks of keys that an anchor chose for them.

Keys up to the block of queries are read where they were chosen, those of the block itself always, causally; the two
parts are computed apart and joined by their sums of exponentials.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from eff_kernels import block_sparse_attention
from torch import Tensor

from eff_attention.layer_reuse.config import LayerReuseConfig

_QUERIES = 128  # in a block, or as many as one block of keys has


class Prompt:
    """One forward pass over a prompt, and what its anchors chose.

    Args:
        length: Tokens of every sequence; none is padded.
        config: Size and number of the blocks of keys.
    """

    def __init__(self, length: int, config: LayerReuseConfig) -> None:
        self.length, self.config = length, config
        self.block_q = config.block_size * max(1, _QUERIES // config.block_size)
        self.chosen: dict[int, Tensor] = {}

    def select_by_means(self, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Note the blocks of keys of each block of queries: those of the largest mean q . mean k, and ``must_select``.

        A block of queries counts its own keys to its ``top_k``, and has no choice among as few blocks as that is.

        Args:
            layer: Number of the anchor.
            q: [B, H, L, D].
            k: [B, KV, S, D]; what lies beyond L is not read.
            scale: Factor of the scores.
        """
        c, each = self.config, self.block_q // self.config.block_size
        queries = _means(q, self.block_q).unflatten(1, (k.size(1), -1))
        keys = _means(k[:, :, : self.length], c.block_size)
        score = scale * queries @ keys.mT[:, :, None]  # [B, KV, G, Tm, Tn]
        tm, tn = score.shape[-2:]
        own = torch.arange(tm, device=q.device)[:, None] * each  # the first block of the diagonal
        place = torch.arange(tn, device=q.device)
        before = place < own
        mass = score.masked_fill(~before, -torch.inf).softmax(-1).nan_to_num_().sum(2)  # nothing lies before the first
        if c.shared_heads:
            mass = mass.sum(1, keepdim=True)
        for m in c.must_select:
            mass = mass.masked_fill(place == (m if m >= 0 else own + 1 + m), torch.inf)
        mass = mass.masked_fill(~before, -1.0)
        room = max(0, c.num_blocks - each)  # beside the diagonal
        rank = mass.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        taken = (rank < room) & before
        heads = q.size(1) // taken.size(1)
        self.chosen[layer] = taken.to(torch.int8).repeat_interleave(heads, 1)

    def attend(self, anchor: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention [B, H, L, D] to the blocks that an anchor chose, and to each block of queries itself."""
        k, v = k[:, :, : self.length], v[:, :, : self.length]
        far = block_sparse_attention(q, k, v, self.chosen[anchor], self.block_q, self.config.block_size, scale)
        near, lse = _diagonal(q, k, v, self.block_q, scale)
        share = torch.sigmoid(far.lse - lse)[..., None]  # of the exponentials; 0 where nothing was chosen
        return torch.lerp(near, far.output.float(), share).to(q.dtype)


def _means(x: Tensor, block: int) -> Tensor:
    """Means over blocks of rows in float32, the last over the rows that it has: [B, H, T, D]."""
    missing = -x.size(2) % block
    sums = F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block)).sum(3, dtype=torch.float32)
    counts = torch.full((sums.size(2), 1), float(block), device=x.device)
    counts[-1] = block - missing
    return sums / counts


def _diagonal(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of each block of tokens to itself, float32 [B, H, L, D] and its lse [B, H, L]."""
    length, group = q.size(2), q.size(1) // k.size(1)
    q, k, v = (F.pad(t, (0, 0, 0, -length % block)).unflatten(2, (-1, block)).float() for t in (q, k, v))
    q = q.unflatten(1, (-1, group))
    causal = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    scores = (scale * q @ k.mT[:, :, None]).masked_fill_(~causal, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp_() @ v[:, :, None]
    return out.flatten(1, 2).flatten(2, 3)[:, :, :length], lse.flatten(1, 2).flatten(2, 3)[:, :, :length]
