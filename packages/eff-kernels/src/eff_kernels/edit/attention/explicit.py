"""Attention computed in the open: float32 logits and weights in blocks of queries, and the edits that rules ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_kernels.edit.attention.call import AttentionCall, AttentionOutput, Edit, EditBlock, Part, head_indices
from eff_kernels.native import DTYPE_CODES
from eff_kernels.op import needs_torch_dispatch
from eff_kernels.ops.attention_rows import row_scores, row_values

_FLASH = 1  # SDPBackend.FLASH_ATTENTION
_BLOCK = 2**24  # entries of a block of logits: 64 MiB in float32


def attend_explicit(
    call: AttentionCall,
    *,
    edit_logits: EditBlock | None = None,
    edit_weights: EditBlock | None = None,
    heads: Sequence[int] | Tensor | None = None,
    rows: slice | None = None,
    weights: bool = False,
    lse: bool = False,
) -> AttentionOutput:
    """Attention without the host's kernel: softmax in float32 (float64 for float64 calls), then the values.

    Scale, softcap, position bias, mask, causality, window and learnt sinks are those of the call, and so are edits that
    it carries; the ones given here come after them. A query that sees nothing gets 0. Memory is bounded: queries
    are taken in blocks, unless ``weights`` are asked for.

    Args:
        call: The call.
        edit_logits: Changes blocks of logits, see `Edit.logits`.
        edit_weights: Changes blocks of weights, see `Edit.weights`.
        heads: Query heads to compute, as indices or boolean mask [H]; None for all.
        rows: Queries to compute; None for all.
        weights: Whether to return the weights, float32.
        lse: Whether to return the log-sum-exp of the (edited) logits, float32.

    Returns:
        Outputs [B, h, q, Dv] of the asked heads and rows, in the call's dtype.
    """
    if edit_logits is not None or edit_weights is not None:
        call = call.edited(logits=edit_logits, weights=edit_weights)
    chosen = None if heads is None else head_indices(heads, call.num_heads)
    dtype = call.dtype  # read where autocast is still on
    value = _of_heads(call.v.to(dtype), chosen, call.num_heads)
    alone = _is_alone(call, _numbers(call, rows))
    value = value if alone else value.to(_precise(call))
    outs, maps, sums = [], [], []
    for part, block in logits(call, chosen, rows):
        prob = softmax(call, part, block)
        kept = F.dropout(prob, call.dropout) if call.dropout else prob
        with _no_autocast(call):
            if alone:
                outs.append(row_values(kept[:, :, 0], value, dtype)[:, :, None])
            else:
                outs.append(_grouped(kept, value).to(dtype))
        if weights:
            maps.append(prob)
        if lse:
            sums.append(log_sum_exp_of(call, part, block))
    return AttentionOutput(_join(outs), _join(maps) if weights else None, torch.cat(sums, 2) if lse and sums else None)


def logits(
    call: AttentionCall, heads: tuple[int, ...] | None = None, rows: slice | Sequence[int] | None = None
) -> Iterator[tuple[Part, Tensor]]:
    """Blocks of edited logits [B, h, q, Sk], hidden entries -inf, with the part of the matrix that each is."""
    device = call.q.device
    index = _numbers(call, rows)
    width = call.num_heads if heads is None else len(heads)
    which = torch.arange(width, device=device) if heads is None else torch.tensor(heads, device=device)
    step = max(1, _BLOCK // max(1, call.k.shape[0] * width * call.num_keys))
    query = call.q if heads is None else call.q[:, list(heads)]
    alone = _is_alone(call, index)
    key = _of_heads(call.k.to(call.dtype), heads, call.num_heads)
    key = key if alone else key.to(_precise(call))
    sinks = _of_sinks(call, heads)
    for start in range(0, len(index), step):
        at = index[start : start + step]
        line = torch.tensor(at, device=device) if not isinstance(at, range) else torch.arange(*_ends(at), device=device)
        keep = call.keep_mask(line)
        # Rows of a range are no copy, and only those that are asked for are made wide.
        some = slice(at[0], at[-1] + 1, at.step) if isinstance(at, range) and at.step > 0 else line
        asked = query[:, :, some].to(call.dtype)
        with _no_autocast(call):
            if alone:
                block = row_scores(asked[:, :, 0], key, call.scale)[:, :, None]
            else:
                block = _grouped(asked.to(_precise(call)), key.mT) * call.scale
            if call.softcap is not None:
                block = call.softcap * torch.tanh(block / call.softcap)
            block = block + _pick(call.additive_mask(line), heads).to(block.dtype)
        part = Part(line, which, _pick(keep, heads), at, range(width) if heads is None else heads, call.num_queries)
        for edit in call.edits:
            if edit.logits is not None:
                block = _edited(block, part, edit, edit.logits).masked_fill(~part.keep, -torch.inf)
        yield part, block if sinks is None else torch.cat([block, sinks.expand(*block.shape[:-1], 1)], -1)


def softmax(call: AttentionCall, part: Part, block: Tensor) -> Tensor:
    """Edited weights [B, h, q, Sk] of a block of logits, which may carry the sink as a last column."""
    empty = ~(block > -torch.inf).any(-1, keepdim=True)
    # A row of nothing but -inf has no softmax, and its gradient would be NaN even where it is not used.
    prob = block.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., : call.num_keys]
    for edit in call.edits:
        if edit.weights is not None:
            prob = _edited(prob, part, edit, edit.weights)
    return prob


def log_sum_exp_of(call: AttentionCall, part: Part, block: Tensor) -> Tensor:
    """Log-sum-exp [B, h, q] of a block of logits, the sink included; -inf where nothing is to be seen."""
    empty = ~(block > -torch.inf).any(-1)
    return block.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)


def dense(call: AttentionCall) -> AttentionOutput:
    """The call by PyTorch's kernel where that can do it, else `attend_explicit`."""
    if call.edits or call.softcap is not None or call.sinks is not None or call.wants_weights:
        return attend_explicit(call, weights=call.wants_weights)
    query, key, value = (t.to(call.dtype) for t in (call.q, call.k, call.v))
    grouped = key.shape[1] != query.shape[1]
    mask: Tensor | None = None
    if call.bias is not None or (isinstance(call.mask, Tensor) and call.mask.is_floating_point()):
        mask = call.additive_mask().to(call.dtype)
    elif call.mask is not None or call.causal or call.window is not None:
        mask = call.keep_mask()
    return AttentionOutput(
        F.scaled_dot_product_attention(query, key, value, mask, call.dropout, scale=call.scale, enable_gqa=grouped)
    )


def flash_with_lse(call: AttentionCall) -> AttentionOutput | None:
    """A causal call of a whole prompt by PyTorch's flash attention for CPUs, which has the log-sum-exp.

    None where PyTorch would take another kernel. The output has the bits of ``scaled_dot_product_attention``.
    """
    q, k, v = call.q, call.k, call.v
    other = (call.mask, call.softcap, call.sinks, call.bias, call.window)
    plain = call.causal and not call.offset and q.shape[2] == k.shape[2] and all(x is None for x in other)
    if not plain or call.edits or call.dropout or call.wants_weights or not q.is_cpu or q.dtype not in DTYPE_CODES:
        return None
    if not q.dtype is k.dtype is v.dtype is call.dtype or q.shape[0] != k.shape[0] or needs_torch_dispatch((q, k, v)):
        return None
    grouped = q.shape[1] != k.shape[1]
    kernel = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=call.scale, enable_gqa=grouped)
    if kernel != _FLASH:
        return None
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=call.scale)
    return AttentionOutput(out, lse=lse)


def _precise(call: AttentionCall) -> torch.dtype:
    return torch.float64 if call.dtype == torch.float64 else torch.float32


def _no_autocast(call: AttentionCall) -> AbstractContextManager[object]:
    return torch.autocast(call.q.device.type, enabled=False)


def _numbers(call: AttentionCall, rows: slice | Sequence[int] | None) -> Sequence[int]:
    """Numbers of the queries that are asked for."""
    if rows is None:
        return range(call.num_queries)
    return range(call.num_queries)[rows] if isinstance(rows, slice) else rows


def _is_alone(call: AttentionCall, index: Sequence[int]) -> bool:
    """Whether one query of each sequence is asked for, and queries and keys have as many sequences."""
    return len(index) == 1 and call.q.shape[0] == call.k.shape[0]


def _ends(at: range) -> tuple[int, int, int]:
    return at.start, at.stop, at.step


def _of_heads(x: Tensor, heads: tuple[int, ...] | None, count: int) -> Tensor:
    """Keys or values of the given query heads; all heads keep their groups, to be multiplied without copies."""
    if heads is None:
        return x
    group = count // x.shape[1]
    return x[:, [h // group for h in heads]]


def _grouped(many: Tensor, few: Tensor) -> Tensor:
    """Products [B, H, q, n] of query heads [B, H, q, m] with those of key heads [B, KV, m, n].

    The queries of a group are taken as rows of one matrix: a broadcast product would copy the keys for each of them.
    """
    if many.shape[1] == few.shape[1]:
        return many @ few
    batch, heads, length = many.shape[:3]
    rows = many.reshape(batch, few.shape[1], -1, many.shape[3])
    return (rows @ few).reshape(-1, heads, length, few.shape[3])


def _of_sinks(call: AttentionCall, heads: tuple[int, ...] | None) -> Tensor | None:
    if call.sinks is None:
        return None
    sinks = call.sinks.to(_precise(call)).reshape(1, -1, 1, 1)
    return sinks if heads is None else sinks[:, list(heads)]


def _pick(mask: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    return mask if heads is None or mask.shape[1] == 1 else mask[:, list(heads)]


def _edited(block: Tensor, part: Part, edit: Edit, change: EditBlock) -> Tensor:
    """A block with the heads and rows of an edit changed; the rest is the same numbers."""
    span = None if edit.rows is None else range(part.count)[edit.rows]
    h = [i for i, head in enumerate(part.head_numbers) if edit.heads is None or head in edit.heads]
    r = [i for i, row in enumerate(part.row_numbers) if span is None or row in span]
    if len(h) == len(part.head_numbers) and len(r) == len(part.row_numbers):
        return _checked(change(block, part), block)
    if not h or not r:
        return block
    old = block[:, h][:, :, r]
    numbers = [part.row_numbers[i] for i in r], [part.head_numbers[i] for i in h]
    keep = part.keep if part.keep.shape[1] == 1 else part.keep[:, h]
    keep = keep if keep.shape[2] == 1 else keep[:, :, r]
    new = _checked(change(old, Part(part.rows[r], part.heads[h], keep, *numbers, part.count)), old)
    out = block.clone()
    out[:, torch.tensor(h, device=block.device)[:, None], torch.tensor(r, device=block.device)] = new
    return out


def _checked(new: Tensor, old: Tensor) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != old.shape:
        got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"an edit of attention must return a tensor of the shape it got, {list(old.shape)}, not {got}")
    return new.to(old.dtype)


def _join(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
