"""Attention over chosen blocks of keys."""

from eff_kernels.ops.block_sparse_attention.api import BlockSparseAttention, block_sparse_attention

__all__ = ["BlockSparseAttention", "block_sparse_attention"]
