"""Arithmetic and traffic of sparse-linear attention, counted from a block map."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from eff_kernels.ops.sparse_linear_attention.blocks import BlockMap
from eff_kernels.ops.sparse_linear_attention.common import in_scope


class Cost(NamedTuple):
    """What a forward needs at least; a multiply-add counts as two operations.

    Attributes:
        sparse: Operations of the two products of the sparse branch.
        linear: Operations of the linear branch: phi(K)^T V for each key block, its sums for each query block, and the
            product with phi(Q).
        dense: Operations of dense attention on the same tensors.
        bytes: Traffic when each tensor is read or written once.
    """

    sparse: int
    linear: int
    dense: int
    bytes: int


def cost(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, linear_scope: str = "marginal") -> Cost:
    """Count the operations and bytes of `sparse_linear_attention`."""
    mask, block_q, block_k = block_map
    rows = _sizes(mask.size(2), q.size(2), block_q, mask)
    columns = _sizes(mask.size(3), k.size(2), block_k, mask)
    pairs = int(((mask > 0) * rows[:, None] * columns).sum())
    width, state = q.size(-1) + v.size(-1), q.size(-1) * (v.size(-1) + 1)
    tokens = q.shape[:3].numel() + k.shape[:3].numel()
    sums = int(in_scope(mask, linear_scope).sum()) if linear_scope != "all" else 0
    return Cost(
        sparse=2 * pairs * width,
        linear=2 * state * (tokens + sums),
        dense=2 * q.shape[:3].numel() * k.size(2) * width,
        bytes=q.nbytes + k.nbytes + v.nbytes + 2 * q.shape[:3].numel() * (v.size(-1) * v.itemsize + 2),
    )


def _sizes(blocks: int, length: int, block: int, like: Tensor) -> Tensor:
    """Rows of each block."""
    sizes = like.new_full((blocks,), 0, dtype=like.long().dtype) + block
    if blocks:
        sizes[-1] = length - (blocks - 1) * block
    return sizes
