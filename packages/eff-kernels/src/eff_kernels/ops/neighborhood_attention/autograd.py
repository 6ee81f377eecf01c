"""Backward of neighborhood attention: an op of its own, with backends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.neighborhood_attention import cpu, reference
from eff_kernels.ops.neighborhood_attention.args import BackwardArgs


def _allocate(grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v, *rest[-2:]))


BACKWARD_OP = Op(
    "neighborhood_attention_backward",
    schema_of(BackwardArgs, "(Tensor, Tensor, Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", cpu.neighborhood_attention_backward, cpu.reject_backward),
        triton_backend("eff_kernels.ops.neighborhood_attention.triton_backward"),
        Backend("reference", reference.neighborhood_attention_backward),
    ],
    fake=_allocate,
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the tensors and the lse, from which the weights are computed again."""
    q, k, v, *ctx.windows, ctx.scale, more_k, more_v = inputs
    ctx.save_for_backward(q, k, v, *output, more_k, more_v)


def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    q, k, v, out, lse, more_k, more_v = ctx.saved_tensors
    args = (q, k, v, out, lse, *ctx.windows, ctx.scale, more_k, more_v)
    gradients = BACKWARD_OP(grad.contiguous(), grad_lse.contiguous(), *args, backend=ctx.backend)
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 8, 9)]
    dq, dk, dv, dmore_k, dmore_v = (g if w else None for g, w in zip(gradients, wanted, strict=True))
    return dq, dk, dv, None, None, None, None, None, dmore_k, dmore_v
