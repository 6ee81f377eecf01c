"""Backward of rope: the gradient turns back by the same angles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the angles; x is not needed."""
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def backward_by(op: Callable[..., Tensor]) -> Callable[..., tuple[Any, ...]]:
    """The backward, computed by the op itself, which makes it differentiable again."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return op(grad, cos, sin, ctx.interleaved, not ctx.inverse, backend=ctx.backend), None, None, None, None

    return backward
