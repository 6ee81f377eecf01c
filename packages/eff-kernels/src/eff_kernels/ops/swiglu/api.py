"""swiglu: checks of the arguments, then dispatch."""

from __future__ import annotations

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.swiglu import autograd, cpu, reference
from eff_kernels.ops.swiglu.args import Args, check

OP = Op(
    "swiglu",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.swiglu, cpu.reject),
        triton_backend("eff_kernels.ops.swiglu.triton"),
        Backend("reference", reference.swiglu),
    ],
    fake=lambda gate, up: gate.new_empty(gate.shape),
    setup_context=autograd.setup_context,
    backward=autograd.backward,
)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Gated activation of Llama-type feed-forward layers.

    y = gate * sigmoid(gate) * up (Shazeer 2020, equation 6), computed in float32 and rounded once to ``gate.dtype``.
    Differentiable in both.

    Args:
        gate: [..., d]; any float dtype. Both may be views, such as the halves of a fused projection's output.
        up: Like ``gate`` in shape and dtype.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        Contiguous tensor of the shape and dtype of ``gate``.

    Raises:
        ValueError: the shapes differ, or are those of scalars.
        TypeError: ``gate`` is not of a float dtype, or ``up`` is not of the same.
        BackendError: the named backend cannot run this call; the message says why.
    """
    check(gate, up)
    return OP(gate, up, backend=backend)
