"""block_sparse_attention: checks of the arguments, then dispatch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.block_sparse_attention import cpu, reference
from eff_kernels.ops.block_sparse_attention.args import Args, check
from eff_kernels.ops.block_sparse_attention.autograd import backward, setup_context


class BlockSparseAttention(NamedTuple):
    """What `block_sparse_attention` returns.

    Attributes:
        output: [B, H, Lq, Dv] of the dtype of the query; 0 for a query that sees no key.
        lse: Logarithm of the sum of the exponentials of the scores, float32 [B, H, Lq]; with it results over different
            keys can be joined. Minus infinity for a query that sees no key.
    """

    output: Tensor
    lse: Tensor


def _allocate(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:-1], v.size(-1)), q.new_empty(q.shape[:-1], dtype=wide)


OP = Op(
    "block_sparse_attention",
    schema_of(Args, "(Tensor, Tensor)"),
    [
        Backend("cpu", cpu.block_sparse_attention, cpu.reject),
        triton_backend("eff_kernels.ops.block_sparse_attention.triton"),
        Backend("reference", reference.block_sparse_attention),
    ],
    fake=_allocate,
    setup_context=setup_context,
    backward=backward,
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    block_q: int = 64,
    block_k: int = 64,
    scale: float | None = None,
    *,
    backend: str = "auto",
) -> BlockSparseAttention:
    """Softmax attention in which each block of queries sees chosen blocks of keys.

    output[i] = sum_j softmax_j(scale q[i] . k[j]) v[j] over the keys j of the blocks that the map chooses for the block
    of query i. Not causal. Time grows with the number of chosen blocks, memory with the number of tokens, except on the
    reference. Differentiable in q, k and v, through the output and through ``lse``.

    Args:
        q: [B, H, Lq, D].
        k: [B, Hkv, Lk, D] of the same dtype; H must be a multiple of Hkv, and query head h reads head h // (H / Hkv).
        v: [B, Hkv, Lk, Dv].
        block_map: int8 [B, H, ceil(Lq / block_q), ceil(Lk / block_k)]; a block is chosen where it is positive.
        block_q: Queries in a block.
        block_k: Keys in a block.
        scale: Factor of the scores; D ** -0.5 by default.
        backend: "auto", "cpu", "triton" or "reference".

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes differ, or the map is not int8.
    """
    check(q, k, v, block_map, block_q, block_k)
    if scale is None:
        scale = 1 / math.sqrt(q.size(-1)) if q.size(-1) else 1.0
    return BlockSparseAttention(*OP(q, k, v, block_map, block_q, block_k, scale, backend=backend))
