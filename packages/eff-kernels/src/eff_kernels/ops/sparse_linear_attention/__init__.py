"""Sparse-linear attention: softmax over a query's critical key blocks, linear attention over the rest."""

from eff_kernels.ops.sparse_linear_attention.api import SparseLinearOutput, sparse_linear_attention
from eff_kernels.ops.sparse_linear_attention.blocks import BlockMap, block_map
from eff_kernels.ops.sparse_linear_attention.cost import Cost, cost

__all__ = ["BlockMap", "Cost", "SparseLinearOutput", "block_map", "cost", "sparse_linear_attention"]
