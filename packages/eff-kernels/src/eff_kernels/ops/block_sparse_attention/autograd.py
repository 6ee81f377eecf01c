"""Backward of block-sparse attention: an op of its own, with backends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.block_sparse_attention import cpu, reference
from eff_kernels.ops.block_sparse_attention.args import BackwardArgs


def _allocate(grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


BACKWARD_OP = Op(
    "block_sparse_attention_backward",
    schema_of(BackwardArgs, "(Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", cpu.block_sparse_attention_backward, cpu.reject_backward),
        triton_backend("eff_kernels.ops.block_sparse_attention.triton_backward"),
        Backend("reference", reference.block_sparse_attention_backward),
    ],
    fake=_allocate,
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the tensors and the lse, from which the weights are computed again."""
    q, k, v, block_map, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, block_map, *output)


def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    args = (*ctx.saved_tensors, ctx.block_q, ctx.block_k, ctx.scale)
    gradients = BACKWARD_OP(grad.contiguous(), grad_lse.contiguous(), *args, backend=ctx.backend)
    kept = (g if w else None for g, w in zip(gradients, ctx.needs_input_grad[:3], strict=True))
    return *kept, None, None, None, None
