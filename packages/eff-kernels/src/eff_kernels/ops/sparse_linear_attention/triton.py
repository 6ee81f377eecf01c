"""Sparse-linear attention on a GPU: Triton's block-sparse attention, and matrix products for the linear branch.

The kernels, and the cases in which they are compiled ahead of time, are those of block_sparse_attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.ops.block_sparse_attention import triton as forward
from eff_kernels.ops.block_sparse_attention import triton_backward as backward
from eff_kernels.ops.sparse_linear_attention import linear as linear_branch
from eff_kernels.ops.sparse_linear_attention.cpu import add


def reject(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int, feature_map: str, linear_scope: str,
    scale: float,
) -> str | None:  # fmt: skip
    return forward.reject(q, k, v, mask, block_q, block_k, scale)


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int, feature_map: str, linear_scope: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference."""
    sparse, lse = forward.run(q, k, v, mask, block_q, block_k, scale)
    return sparse, linear_branch.forward(q, k, v, mask, block_q, block_k, feature_map, linear_scope), lse


def reject_backward(grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor, *args: Any) -> str | None:
    q, k, v, mask, _, _, _, block_q, block_k, _, _, scale = args
    return forward.reject(q, k, v, mask, block_q, block_k, scale)


def run_backward(
    grad_sparse: Tensor,
    grad_linear: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    sparse: Tensor,
    linear: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear_scope: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    near = backward.run(grad_sparse, grad_lse, q, k, v, mask, sparse, lse, block_q, block_k, scale)
    far = linear_branch.backward(grad_linear, q, k, v, mask, linear, block_q, block_k, feature_map, linear_scope)
    return add(near, far)
