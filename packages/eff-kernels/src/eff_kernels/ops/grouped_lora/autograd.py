"""Backward of grouped_lora: an op of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.grouped_lora import reference
from eff_kernels.ops.grouped_lora.args import BackwardArgs


def _fake(*args: *BackwardArgs) -> tuple[Tensor, ...]:
    _, x, a, b, ids, weights, _, experts = args
    grad_a, grad_b = (t.new_empty(t.shape if experts else (0, *t.shape[1:])) for t in (a, b))
    return x.new_empty(x.shape), grad_a, grad_b, (x if weights is None else weights).new_empty(ids.shape)


def _reject_cpu(grad: Tensor, x: Tensor, *_: Any) -> str | None:
    return None if x.is_cpu else f"needs CPU tensors, got x on {x.device}"


# On the CPU, grouped products of PyTorch are as quick on the many rows of training as compiled code of our own.
BACKWARD_OP = Op(
    "grouped_lora_backward",
    schema_of(BackwardArgs, "(Tensor, Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", reference.grouped_lora_backward, _reject_cpu),
        triton_backend("eff_kernels.ops.grouped_lora.triton", run="run_backward", reject="reject_backward"),
        Backend("reference", reference.grouped_lora_backward),
    ],
    fake=_fake,
)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the inputs; the low-rank sums are computed again, which costs little compared with storing them."""
    x, a, b, ids, weights, scale, y = inputs
    ctx.save_for_backward(x, a, b, ids, weights, scale)
    ctx.y_dtype = None if y is None else y.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients to x, a, b, ids, weights, scale and y."""
    x, a, b, ids, weights, scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = da = db = dweights = None
    if any(needs[:5]):
        dx, da, db, dweights = BACKWARD_OP(
            grad, x, a, b, ids, weights, scale, bool(needs[1] or needs[2]), backend=ctx.backend
        )
    return (
        dx if needs[0] else None, da if needs[1] else None, db if needs[2] else None, None,
        dweights if needs[4] else None, None, grad.to(ctx.y_dtype) if needs[6] else None,
    )  # fmt: skip
