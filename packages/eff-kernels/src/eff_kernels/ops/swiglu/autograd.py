"""Backward of swiglu: the sigmoid is computed again, so that only the inputs are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.swiglu import cpu, reference
from eff_kernels.ops.swiglu.args import BackwardArgs

BACKWARD_OP = Op(
    "swiglu_backward",
    schema_of(BackwardArgs, "(Tensor, Tensor)"),
    [
        Backend("cpu", cpu.swiglu_backward, cpu.reject_backward),
        triton_backend("eff_kernels.ops.swiglu.triton", run="swiglu_backward", reject="reject_backward"),
        Backend("reference", reference.swiglu_backward),
    ],
    fake=lambda grad, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep both inputs."""
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to gate and up."""
    gate, up = ctx.saved_tensors
    to_gate, to_up = BACKWARD_OP(grad, gate, up, backend=ctx.backend)
    return to_gate, to_up
