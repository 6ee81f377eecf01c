"""linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op
from eff_kernels.ops.linear import cpu, reference


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, weight.dtype)
    grad = grad.to(wide)
    dx = (grad @ weight.to(wide)).to(x.dtype) if ctx.needs_input_grad[0] else None
    dweight = (grad.t() @ x.to(wide)).to(weight.dtype) if ctx.needs_input_grad[1] else None
    dbias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, dweight, dbias


OP = Op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    [Backend("cpu", cpu.linear, cpu.reject), Backend("reference", reference.linear)],
    fake=lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
    setup_context=_remember,
    backward=_backward,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Multiply by a float weight that may be stored in another dtype than the activations.

    y = x @ weight^T + bias. On the CPU the sums are float32, 16-bit weights are widened on the way without a copy, and
    each row of y has the same bits whatever rows stand beside it: text from a batch is then the text of a lone run.
    On other devices this is `torch.nn.functional.linear`, which does not promise that. Differentiable in x, weight and
    bias.

    Args:
        x: Activations, [..., K]; any float dtype.
        weight: [N, K], any float dtype.
        bias: [N], any float dtype.
        backend: "auto", "cpu" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., N], contiguous, of the dtype of ``x``.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ``x``, ``weight`` or ``bias`` is not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.

    Example:
        >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
        tensor([[3.]])
    """
    shape, stored = x.shape, weight.shape
    if len(stored) != 2 or not shape or shape[-1] != stored[1]:
        raise ValueError(f"x [..., K] and weight [N, K] do not fit: got {list(shape)} and {list(stored)}")
    n = stored[0]
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must have shape [{n}], got {list(bias.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must have a float dtype, got {tensor.dtype}")
    if len(shape) == 2:
        return OP(x, weight, bias, backend=backend)
    rows = x.reshape(shape[:-1].numel(), shape[-1])
    return OP(rows, weight, bias, backend=backend).view(*shape[:-1], n)
