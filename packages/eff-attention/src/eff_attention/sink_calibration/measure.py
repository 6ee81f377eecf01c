"""One look at a call: the weight that each key gets, how many queries see it, and the log-sum-exp of each query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from eff_kernels.edit.attention import AttentionCall, Part, column_sums
from torch import Tensor

from eff_attention.sink_calibration import direct


class Seen(NamedTuple):
    """What a pass saw.

    Attributes:
        sums: Weight of each key from the queries that count, float32 [B, h, Sk].
        rows: Number of these queries that could see it, int64 [B, Sk].
        lse: Log-sum-exp of the logits of each query, float32 [B, h, Sq]; None of a single query that has weights.
        weights: Of a single query that sees all keys, [B, h, 1, Sk].
    """

    sums: Tensor
    rows: Tensor
    lse: Tensor | None
    weights: Tensor | None = None


@torch.no_grad()
def look(call: AttentionCall, heads: tuple[int, ...], real: Tensor) -> Seen:
    """Read a call without holding a whole map.

    Args:
        call: The call.
        heads: Query heads to look at.
        real: Which queries are no padding, bool [B, Sq].
    """
    if direct.is_plain(call) and bool(real.all()):
        return _plainly(call, heads)
    lse, rows = [], []

    def on_logits(block: Tensor, part: Part) -> Tensor:
        empty = ~(block > -torch.inf).any(-1)
        lse.append(block.masked_fill(empty[..., None], 0.0).logsumexp(-1))
        return block

    def on_weights(block: Tensor, part: Part) -> Tensor:
        counts = real[:, part.rows]
        seen = part.keep.any(1).expand(-1, len(part.row_numbers), block.shape[-1])
        rows.append((seen & counts[..., None]).sum(1))
        return torch.where(counts[:, None, :, None], block, 0.0)

    sums = column_sums(call.edited(logits=on_logits, weights=on_weights), heads)
    return Seen(sums.float(), torch.stack(rows).sum(0), torch.cat(lse, 2))


def _plainly(call: AttentionCall, heads: tuple[int, ...]) -> Seen:
    count = call.num_queries
    later = torch.arange(count, 0, -1, device=call.q.device)  # queries from each one on
    rows = torch.cat([later.new_full((call.num_keys - count,), count), later]).expand(call.q.shape[0], -1)
    if count == 1:
        weights = direct.weights_of_one(call, heads)
        return Seen(weights[:, :, 0].float(), rows, None, weights)
    sums, lse = direct.sums_and_lse(call, heads)
    return Seen(sums.float(), rows, lse)
