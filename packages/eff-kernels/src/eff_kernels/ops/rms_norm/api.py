"""rms_norm and add_rms_norm: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.rms_norm import autograd, cpu, reference

_TRITON = "eff_kernels.ops.rms_norm.triton"

OP = Op(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    [Backend("cpu", cpu.rms_norm, cpu.reject), triton_backend(_TRITON), Backend("reference", reference.rms_norm)],
    fake=lambda x, weight, eps: x.new_empty(x.shape),
    setup_context=autograd.setup_context,
    backward=autograd.backward,
)

ADD_OP = Op(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    [
        Backend("cpu", cpu.add_rms_norm, cpu.reject_add),
        triton_backend(_TRITON, run="add_rms_norm", reject="reject_add"),
        Backend("reference", reference.add_rms_norm),
    ],
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    setup_context=autograd.setup_add_context,
    backward=autograd.add_backward,
)


class AddRMSNorm(NamedTuple):
    """Result of `add_rms_norm`."""

    output: Tensor
    residual: Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """Scale each row by the inverse of its root mean square.

    y = x / sqrt(mean(x**2) + eps) * weight, computed in float32 and rounded once to ``x.dtype`` (Zhang and Sennrich
    2019, equation 4). Differentiable in x and weight.

    Args:
        x: Rows to normalise, [..., d]; any float dtype.
        weight: Gain of each feature, [d]; any float dtype.
        eps: Added under the root.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        Contiguous tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: ``weight`` does not have length d.
        TypeError: ``x`` is not of a float dtype.
        BackendError: the named backend cannot run this call; the message says why.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2))
        tensor([[0.8485, 1.1314]])
    """
    shape = x.shape
    if not shape or weight.shape != (shape[-1],):
        raise ValueError(_wrong_shapes(x, weight))
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must have a float dtype, got {x.dtype}")
    return OP(x, weight, eps, backend=backend)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> AddRMSNorm:
    """Add a residual and normalise the sum, in one pass over memory.

    residual' = x + residual, rounded to ``x.dtype``; output = rms_norm(residual', weight). Differentiable in x,
    residual and weight.

    Args:
        x: Output of a layer, [..., d]; any float dtype.
        residual: The residual stream, like ``x`` in shape and dtype.
        weight: Gain of each feature, [d]; any float dtype.
        eps: Added under the root.
        backend: As for `rms_norm`.

    Returns:
        AddRMSNorm(output, residual'), both contiguous and like ``x``; no input is changed.

    Raises:
        ValueError: the shapes of ``x`` and ``residual`` differ, or ``weight`` does not have length d.
        TypeError: ``x`` is not of a float dtype, or ``residual`` is not of the same.
        BackendError: the named backend cannot run this call; the message says why.
    """
    shape = x.shape
    if shape != residual.shape:
        raise ValueError(f"x and residual must have one shape, got {list(x.shape)} and {list(residual.shape)}")
    if not shape or weight.shape != (shape[-1],):
        raise ValueError(_wrong_shapes(x, weight))
    if not x.dtype.is_floating_point or residual.dtype != x.dtype:
        raise TypeError(f"x and residual must have one float dtype, got {x.dtype} and {residual.dtype}")
    return AddRMSNorm(*ADD_OP(x, residual, weight, eps, backend=backend))


def _wrong_shapes(x: Tensor, weight: Tensor) -> str:
    if x.dim() == 0:
        return "x must have at least one dimension, got a scalar"
    return f"weight must have shape [{x.size(-1)}] for x of shape {list(x.shape)}, got {list(weight.shape)}"
