"""Backward of the self-gated scan: an op of its own, with backends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.self_gated_scan import cpu, reference
from eff_kernels.ops.self_gated_scan.args import BackwardArgs

BACKWARD_OP = Op(
    "self_gated_scan_backward",
    schema_of(BackwardArgs, "(Tensor, Tensor)"),
    [
        Backend("cpu", cpu.self_gated_scan_backward, cpu.reject_backward),
        triton_backend("eff_kernels.ops.self_gated_scan.triton", run="backward", reject="reject_backward"),
        Backend("reference", reference.self_gated_scan_backward),
    ],
    fake=lambda grad, score, v, *_: (score.new_empty(score.shape), v.new_empty(v.shape)),
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the tensors, the output and the highest scores, from which the weights are computed again."""
    score, v, state, _ = inputs
    out, tops, totals, final = output
    ctx.save_for_backward(score, v, out, tops, totals, state)
    ctx.mark_non_differentiable(tops, totals, final)


def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    """One gradient for each argument of the forward."""
    gradients = BACKWARD_OP(grad.contiguous(), *ctx.saved_tensors, backend=ctx.backend)
    return (*(g if w else None for g, w in zip(gradients, ctx.needs_input_grad[:2], strict=True)), None, None)
