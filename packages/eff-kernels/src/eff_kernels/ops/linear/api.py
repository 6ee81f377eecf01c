"""linear: checks of the arguments, then dispatch."""

from __future__ import annotations

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of
from eff_kernels.ops.common import over_rows
from eff_kernels.ops.linear import cpu, reference
from eff_kernels.ops.linear.args import Args, check
from eff_kernels.ops.linear.autograd import backward, setup_context

OP = Op(
    "linear",
    schema_of(Args, "Tensor"),
    [Backend("cpu", cpu.linear, cpu.reject), Backend("reference", reference.linear)],
    fake=lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
    setup_context=setup_context,
    backward=backward,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Multiply by a float weight that may be stored in another dtype than the activations.

    y = x @ weight^T + bias. On the CPU the sums are float32, 16-bit weights are widened on the way without a copy, and
    each row of y has the same bits whatever the other rows are: text from a batch is then the text of a lone run.
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
    check(x, weight, bias)
    return over_rows(OP, x, weight, bias, backend=backend)
