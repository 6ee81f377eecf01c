"""decode_attention: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.decode_attention import cpu, reference
from eff_kernels.ops.decode_attention.args import Args, ScoredArgs, check
from eff_kernels.ops.decode_attention.common import num_blocks


class ScoredAttention(NamedTuple):
    """What `scored_decode_attention` returns.

    Attributes:
        output: [B, H, D] of the dtype of the queries, as `decode_attention` gives it.
        mass: float32 [B, KV, blocks]: the weights of each block of keys, summed over the query heads that share them.
    """

    output: Tensor
    mass: Tensor


OP = Op(
    "decode_attention",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.decode_attention, cpu.reject),
        triton_backend("eff_kernels.ops.decode_attention.triton"),
        Backend("reference", reference.decode_attention),
    ],
    fake=lambda q, *_: q.new_empty(q.shape),
)


def _allocate_scored(*args: *ScoredArgs) -> tuple[Tensor, Tensor]:
    q, k, _, _, block_table, run, score_block, *_ = args
    blocks = num_blocks(k, block_table, run, score_block)
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.size(0), k.size(1), blocks, dtype=wide)


SCORED = Op(
    "scored_decode_attention",
    schema_of(ScoredArgs, "(Tensor, Tensor)"),
    [
        Backend("cpu", cpu.scored_decode_attention, cpu.reject),
        triton_backend("eff_kernels.ops.decode_attention.triton", run="run_scored", reject="reject_scored"),
        Backend("reference", reference.scored_decode_attention),
    ],
    fake=_allocate_scored,
)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    run: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from one query per sequence to the keys and values of its cache.

    out[b, h] = softmax(scale * q[b, h] . k[b, h // (H / KV), :lengths[b]]) v[...], computed in float32. Inference only.

    Args:
        q: Queries, [B, H, D]; any float dtype.
        k: Keys, [B, KV, S, D], or the pages of a paged cache, [P, KV, page, D]; H must be a multiple of KV, and
            query head h reads key-value head h // (H / KV). The dtype may differ from that of ``q``.
        v: Values, like ``k``.
        lengths: Number of keys of each sequence, int32 [B]; with 0 the output is zero.
        block_table: For a paged cache, int32 [B, max_pages]: key j of sequence b is row j % page of page
            block_table[b, j // page]. Entries beyond the length are not read. With [B, KV, max_pages] each key-value
            head has a table of its own, and so attends to keys of its own choice.
        run: Makes ``block_table`` choose rows of a cache [B, KV, S, D] that has no pages: key j of sequence b is its
            row block_table[b, j // run] + j % run. A run may begin at any row.
        scale: Factor of the scores; D ** -0.5 by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [B, H, D] of the dtype of ``q``.

    Raises:
        ValueError: shapes do not fit, or, on the CPU, a length or an entry lies outside the cache.
        TypeError: a dtype is not as stated.
        BackendError: the named backend cannot run this call; the message says why.
    """
    check(q, k, v, lengths, block_table, run)
    return OP(q, k, v, lengths, block_table, run or 0, _scale(q, scale), backend=backend)


def scored_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    score_block: int,
    block_table: Tensor | None = None,
    run: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> ScoredAttention:
    """Attend as `decode_attention` does, and say how much weight each block of keys got.

    mass[b, g, n] = sum of the softmax weights of keys n * score_block to (n + 1) * score_block - 1 over the query heads
    of key-value head g; a row of it sums to H / KV. The weights are those of the output, so it costs one pass.

    Args:
        q: Queries, [B, H, D].
        k: Keys, as for `decode_attention`.
        v: Values, like ``k``.
        lengths: Number of keys of each sequence, int32 [B].
        score_block: Keys of a block. A GPU takes multiples of 64 (32 for heads wider than 128, 16 in float32).
        block_table: As for `decode_attention`.
        run: As for `decode_attention`.
        scale: Factor of the scores; D ** -0.5 by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Raises:
        ValueError, TypeError, BackendError: as `decode_attention`, or ``score_block`` is less than 1.
    """
    check(q, k, v, lengths, block_table, run)
    if score_block < 1:
        raise ValueError(f"score_block must be 1 or more, got {score_block}")
    return ScoredAttention(
        *SCORED(q, k, v, lengths, block_table, run or 0, score_block, _scale(q, scale), backend=backend)
    )


def _scale(q: Tensor, scale: float | None) -> float:
    return q.size(-1) ** -0.5 if scale is None else float(scale)
