"""rms_norm and add_rms_norm: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.rms_norm import autograd, cpu, reference
from eff_kernels.ops.rms_norm.args import AddArgs, Args, check, check_add

_TRITON = "eff_kernels.ops.rms_norm.triton"

OP = Op(
    "rms_norm",
    schema_of(Args, "Tensor"),
    [Backend("cpu", cpu.rms_norm, cpu.reject), triton_backend(_TRITON), Backend("reference", reference.rms_norm)],
    fake=lambda x, weight, eps: x.new_empty(x.shape),
    setup_context=autograd.setup_context,
    backward=autograd.backward,
)

ADD_OP = Op(
    "add_rms_norm",
    schema_of(AddArgs, "(Tensor, Tensor)"),
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
    check(x, weight, eps)
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
    check_add(x, residual, weight, eps)
    return AddRMSNorm(*ADD_OP(x, residual, weight, eps, backend=backend))
