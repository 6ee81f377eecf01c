"""Attention of a part to a part, and layers one over the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def contextual_attention(
    q: Tensor, k: Tensor, v: Tensor, query_idx: Tensor, key_idx: Tensor, *, num_heads_first: bool = True
) -> Tensor:
    """Attention of some tokens to themselves and to others (LayerBind, equation 3).

    Equal to those rows of attention under a mask that lets through ``query_idx`` and ``key_idx``, without the rest.

    Args:
        q: Queries of all tokens, [B, H, S, D] ([B, S, H, D] if not ``num_heads_first``).
        k: Keys likewise.
        v: Values likewise.
        query_idx: Tokens that ask, int64 [n].
        key_idx: Tokens that they see beside themselves, int64 [m]; those among ``query_idx`` count once.
        num_heads_first: Order of the tensors' dimensions.

    Returns:
        [B, H, n, D], or [B, n, H, D].
    """
    if not num_heads_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    keys = torch.cat([query_idx, key_idx[~torch.isin(key_idx, query_idx)]])
    out = F.scaled_dot_product_attention(q.index_select(2, query_idx), k.index_select(2, keys), v.index_select(2, keys))
    return out if num_heads_first else out.transpose(1, 2)


def composite_layers(
    base: Tensor, locals_: Sequence[Tensor], masks: Sequence[Tensor], opacity: float, indices: Sequence[Tensor]
) -> Tensor:
    """Lay the outputs of layers over a common one: e = (1 - opacity M) e + opacity M e_i in order (equation 12).

    Args:
        base: Output for all picture tokens, [B, H, N, D].
        locals_: Outputs of the layers for their own tokens, [B, H, n, D] each, the furthest first.
        masks: What of them counts, [B, n] each, bool or 0 to 1.
        opacity: Weight of a layer, 0 to 1.
        indices: Their tokens, int64 [n] each.

    Returns:
        [B, H, N, D] of the base's type; computed in float32 at least.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    now = base.to(wide)
    for own, mask, idx in zip(locals_, masks, indices, strict=True):
        weight = opacity * mask[:, None, :, None].to(wide)
        here = now.index_select(2, idx)
        now = now.index_copy(2, idx, (1 - weight) * here + weight * own.to(wide))
    return now.to(base.dtype)
