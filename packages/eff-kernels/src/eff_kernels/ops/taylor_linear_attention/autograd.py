"""Backward of Taylor attention: an op of its own, with backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.taylor_linear_attention import chunks, reference
from eff_kernels.ops.taylor_linear_attention.args import BackwardArgs

BACKWARD_OP = Op(
    "taylor_linear_attention_backward",
    schema_of(BackwardArgs, "(Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", chunks.backward, chunks.reject_backward),
        triton_backend("eff_kernels.ops.taylor_linear_attention.triton", run="backward", reject="reject_backward"),
        Backend("reference", reference.taylor_linear_attention_backward),
    ],
    fake=lambda grad, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the tensors; normaliser and state carry no gradient."""
    q, k, v, key_mask, ctx.chunk_size, ctx.scale, state, _ = inputs
    out, norm, final = output
    ctx.save_for_backward(q, k, v, out, norm, key_mask, state)
    ctx.mark_non_differentiable(norm, final)


def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    q, k, v, out, norm, key_mask, state = ctx.saved_tensors
    args = (q, k, v, out, norm, key_mask, ctx.chunk_size, ctx.scale, state)
    gradients = BACKWARD_OP(grad.contiguous(memory_format=torch.contiguous_format), *args, backend=ctx.backend)
    wanted = ctx.needs_input_grad[:3]
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None, None, None)
