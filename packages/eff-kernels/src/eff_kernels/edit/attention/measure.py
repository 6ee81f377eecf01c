"""Numbers about one call of attention, in float32, without ever holding a whole map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff_kernels.edit.attention.call import AttentionCall, head_indices
from eff_kernels.edit.attention.explicit import log_sum_exp_of, logits, softmax

Heads = Sequence[int] | Tensor | None


def rows(call: AttentionCall, q_index: Sequence[int] | Tensor | slice, heads: Heads = None) -> Tensor:
    """Weights of some queries, [B, h, n, Sk]. Negative indices count from the last query.

    Raises:
        ValueError: a query or head does not exist.
    """
    index = _indices(q_index, call.num_queries, "query")
    blocks = [softmax(call, part, block) for part, block in logits(call, _heads(call, heads), index)]
    return torch.cat(blocks, 2) if blocks else _empty(call, heads, 0, call.num_keys)


def columns(call: AttentionCall, k_index: Sequence[int] | Tensor | slice, heads: Heads = None) -> Tensor:
    """Weights that all queries give to some keys, [B, h, Sq, n]. Negative indices count from the last key.

    Raises:
        ValueError: a key or head does not exist.
    """
    index = _indices(k_index, call.num_keys, "key")
    at = torch.tensor(list(index), dtype=torch.int64, device=call.q.device)
    blocks = [softmax(call, part, block)[..., at] for part, block in logits(call, _heads(call, heads))]
    return torch.cat(blocks, 2)


def masses(call: AttentionCall, key_groups: Tensor, heads: Heads = None, q_index: slice | None = None) -> Tensor:
    """Summed weight of groups of keys, [B, h, Sq, n].

    Args:
        call: The call.
        key_groups: Which keys are in which group, bool [n, Sk] or [B, n, Sk]; a number is a factor.
        heads: Query heads; None for all.
        q_index: Queries; None for all.

    Raises:
        ValueError: ``key_groups`` does not fit the keys.
    """
    if key_groups.dim() not in (2, 3) or key_groups.shape[-1] != call.num_keys:
        raise ValueError(
            f"key_groups must be [n, {call.num_keys}] or [B, n, {call.num_keys}], got {list(key_groups.shape)}"
        )
    blocks = []
    for part, block in logits(call, _heads(call, heads), q_index):
        prob = softmax(call, part, block)
        groups = key_groups.to(device=prob.device, dtype=prob.dtype).mT
        blocks.append(_plain(prob, groups if groups.dim() == 2 else groups[:, None]))
    return torch.cat(blocks, 2)


def column_sums(call: AttentionCall, heads: Heads = None, q_index: slice | None = None) -> Tensor:
    """Weight that each key gets from all queries together, [B, h, Sk]."""
    blocks = [softmax(call, part, block).sum(2) for part, block in logits(call, _heads(call, heads), q_index)]
    return torch.stack(blocks).sum(0)


def entropy(call: AttentionCall, heads: Heads = None, q_index: slice | None = None) -> Tensor:
    """Entropy of each query's distribution over keys in nats, [B, h, Sq]: the mean of log-sum-exp - logit.

    A learnt sink is no key: the distribution is that of the keys among themselves. Edits of weights are not looked
    at, edits of logits are. A query that sees nothing has 0.
    """
    blocks = []
    for part, block in logits(call, _heads(call, heads), q_index):
        keys = block[..., : call.num_keys]
        lse = log_sum_exp_of(call, part, keys)
        top, seen = torch.where(lse > -torch.inf, lse, 0.0)[..., None], keys > -torch.inf
        safe = torch.where(seen, keys, 0.0)
        prob = torch.where(seen, (safe - top).exp(), 0.0)
        blocks.append((prob * (top - safe)).sum(-1))
    return torch.cat(blocks, 2)


def log_sum_exp(call: AttentionCall, heads: Heads = None, q_index: slice | None = None) -> Tensor:
    """Log-sum-exp of each query's logits, the learnt sink included, [B, h, Sq]; -inf where nothing is to be seen.

    A weight is ``exp(logit - log_sum_exp)``.
    """
    blocks = [log_sum_exp_of(call, part, block) for part, block in logits(call, _heads(call, heads), q_index)]
    return torch.cat(blocks, 2)


def _plain(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _heads(call: AttentionCall, heads: Heads) -> tuple[int, ...] | None:
    return None if heads is None else head_indices(heads, call.num_heads)


def _indices(index: Sequence[int] | Tensor | slice, count: int, what: str) -> Sequence[int]:
    if isinstance(index, slice):
        return range(count)[index]
    if isinstance(index, Tensor):
        index = index.nonzero()[:, 0].tolist() if index.dtype == torch.bool else index.tolist()
    out = [int(i) + count if i < 0 else int(i) for i in index]
    if any(not 0 <= i < count for i in out):
        raise ValueError(f"there are {count} {what} positions, got {list(index)}")
    return out


def _empty(call: AttentionCall, heads: Heads, queries: int, keys: int) -> Tensor:
    count = call.num_heads if heads is None else len(head_indices(heads, call.num_heads))
    return call.q.new_zeros((call.k.shape[0], count, queries, keys), dtype=torch.float32)
