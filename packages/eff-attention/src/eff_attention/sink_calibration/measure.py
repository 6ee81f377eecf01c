"""One look at a call: the weight that each key gets, how many queries see it, and the log-sum-exp of each query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from eff_kernels import attention_columns
from eff_kernels.edit.attention import AttentionCall, Part, column_sums
from torch import Tensor

from eff_attention.plain import alike, is_plain


class Seen(NamedTuple):
    """What a pass saw.

    Attributes:
        sums: Weight of each key from the queries that count, float32 [B, h, Sk].
        rows: Number of these queries that could see it, int64 [B, Sk].
        lse: Log-sum-exp of the logits of each query, float32 [B, h, Sq].
    """

    sums: Tensor
    rows: Tensor
    lse: Tensor


@torch.no_grad()
def look(
    call: AttentionCall,
    heads: tuple[int, ...],
    real: Tensor,
    seen_by: Tensor | None = None,
    lse: Tensor | None = None,
) -> Seen:
    """Read a call without holding a whole map.

    Args:
        call: The call.
        heads: Query heads to look at.
        real: Which queries are no padding, bool [B, Sq].
        seen_by: `plain_rows` of the call, if they are known and all queries are real.
        lse: Log-sum-exp of all heads of a plain call, if it is known.
    """
    if is_plain(call) and (seen_by is not None or bool(real.all())):
        if seen_by is None:
            seen_by = plain_rows(call.q.shape[0], call.num_queries, call.num_keys, call.q.device)
        query, key = alike(call, call.q), alike(call, call.k)
        sums, own = attention_columns(query, key, scale=call.scale, heads=heads, lse=lse)
        return Seen(sums.float(), seen_by, own)
    found, rows = [], []

    def on_logits(block: Tensor, part: Part) -> Tensor:
        empty = ~(block > -torch.inf).any(-1)
        found.append(block.masked_fill(empty[..., None], 0.0).logsumexp(-1))
        return block

    def on_weights(block: Tensor, part: Part) -> Tensor:
        counts = real[:, part.rows]
        seen = part.keep.any(1).expand(-1, len(part.row_numbers), block.shape[-1])
        rows.append((seen & counts[..., None]).sum(1))
        return torch.where(counts[:, None, :, None], block, 0.0)

    sums = column_sums(call.edited(logits=on_logits, weights=on_weights), heads)
    return Seen(sums.float(), torch.stack(rows).sum(0), torch.cat(found, 2))


def plain_rows(batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """How many of the last ``queries`` of ``keys`` tokens see each key, int64 [B, Sk]."""
    later = torch.arange(queries, 0, -1, device=device)  # queries from each one on
    return torch.cat([later.new_full((keys - queries,), queries), later]).expand(batch, -1)
