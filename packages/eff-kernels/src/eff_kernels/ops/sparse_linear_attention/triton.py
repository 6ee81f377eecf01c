"""Sparse-linear attention on a GPU: Triton's block-sparse attention, and matrix products for the linear branch.

The kernels, and the cases in which they are compiled ahead of time, are those of block_sparse_attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.ops.block_sparse_attention import triton as forward
from eff_kernels.ops.block_sparse_attention import triton_backward as backward
from eff_kernels.ops.sparse_linear_attention import linear as linear_branch
from eff_kernels.ops.sparse_linear_attention.args import Args, BackwardArgs
from eff_kernels.ops.sparse_linear_attention.common import add


def reject(*args: *Args) -> str | None:
    q, k, v, mask, block_q, block_k, *_, scale = args
    return forward.reject(q, k, v, mask, block_q, block_k, scale)


def run(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    q, k, v, mask, block_q, block_k, feature_map, linear_scope, scale = args
    sparse, lse = forward.run(q, k, v, mask, block_q, block_k, scale)
    return sparse, linear_branch.forward(q, k, v, mask, block_q, block_k, feature_map, linear_scope), lse


def reject_backward(grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor, *args: Any) -> str | None:
    q, k, v, mask, *_, block_q, block_k, _, _, scale = args
    return forward.reject(q, k, v, mask, block_q, block_k, scale)


def run_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    grad_sparse, grad_linear, grad_lse, q, k, v, mask, sparse, linear, lse = args[:10]
    block_q, block_k, feature_map, linear_scope, scale = args[10:]
    sparse_grads = backward.run(grad_sparse, grad_lse, q, k, v, mask, sparse, lse, block_q, block_k, scale)
    linear_grads = linear_branch.backward(
        grad_linear, q, k, v, mask, linear, block_q, block_k, feature_map, linear_scope
    )
    return add(sparse_grads, linear_grads)
