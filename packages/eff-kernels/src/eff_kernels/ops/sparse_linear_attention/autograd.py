"""Backward of sparse-linear attention: an op of its own, with backends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.sparse_linear_attention import cpu, reference
from eff_kernels.ops.sparse_linear_attention.args import BackwardArgs


def _allocate(grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in args[:3])


BACKWARD_OP = Op(
    "sparse_linear_attention_backward",
    schema_of(BackwardArgs, "(Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", cpu.sparse_linear_attention_backward, cpu.reject_backward),
        triton_backend("eff_kernels.ops.sparse_linear_attention.triton", run="run_backward", reject="reject_backward"),
        Backend("reference", reference.sparse_linear_attention_backward),
    ],
    fake=_allocate,
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep the tensors, from which the weights are computed again."""
    *tensors, ctx.block_q, ctx.block_k, ctx.feature_map, ctx.linear_scope, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    settings = (ctx.block_q, ctx.block_k, ctx.feature_map, ctx.linear_scope, ctx.scale)
    gradients = BACKWARD_OP(*(g.contiguous() for g in grads), *ctx.saved_tensors, *settings, backend=ctx.backend)
    wanted = ctx.needs_input_grad[:3]
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 6
