"""grouped_lora: checks of the arguments, then dispatch."""

from __future__ import annotations

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.grouped_lora import autograd, cpu, reference
from eff_kernels.ops.grouped_lora.args import Args, check


def _fake(*args: *Args) -> Tensor:
    x, _, b, *_, y = args
    return x.new_empty((x.shape[0], b.shape[1]), dtype=x.dtype if y is None else y.dtype)


OP = Op(
    "grouped_lora",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.grouped_lora, cpu.reject),
        triton_backend("eff_kernels.ops.grouped_lora.triton"),
        Backend("reference", reference.grouped_lora),
    ],
    fake=_fake,
    setup_context=autograd.setup_context,
    backward=autograd.backward,
)


def grouped_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    weights: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    y: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add to each row the low-rank updates of the experts that it names.

    out[t] = y[t] + sum_j weights[t, j] * scale[e] * b[e] @ (a[e] @ x[t]) with e = ids[t, j], summed in float32 and
    rounded once. Rows may differ in their experts; nothing of size rows x experts x out is made. Adapters of several
    ranks are padded with rows of zeros. Differentiable in x, a, b, weights and y.

    Args:
        x: Inputs, [..., K]; any float dtype.
        a: First factors, [E, R, K]; any float dtype.
        b: Second factors, [E, N, R], of the dtype of ``a``.
        ids: Experts of each row, [..., k], int32 or int64; -1 is none. An expert may occur in several places.
        weights: Of each place of ``ids``, [..., k]; any float dtype; ones if None.
        scale: Factor of each expert such as alpha / rank, [E], any float dtype; ones if None. It gets no gradient.
        y: What the updates are added to, [..., N], any float dtype; zeros if None.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [..., N], contiguous, of the dtype of ``y``, or of ``x`` without it. A row whose ids are all -1 has the bits of
        ``y``.

    Raises:
        ValueError: shapes do not fit, or tensors are on several devices.
        TypeError: a tensor is of another kind of dtype than said above.
        IndexError: an id is below -1 or not below E. On a GPU it counts as -1: to look would stop the queue.
        BackendError: the named backend cannot run this call; the message says why.

    Example:
        >>> a, b = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[1.0]], [[10.0]]])
        >>> grouped_lora(torch.tensor([[2.0, 3.0], [2.0, 3.0]]), a, b, torch.tensor([[0], [1]]))
        tensor([[ 2.],
                [30.]])
    """
    check(x, a, b, ids, weights, scale, y)
    lead = x.shape[:-1]
    if len(lead) == 1:
        return OP(x, a, b, ids, weights, scale, y, backend=backend)
    rows = lead.numel()
    out = OP(
        x.reshape(rows, x.shape[-1]), a, b, ids.reshape(rows, ids.shape[-1]),
        None if weights is None else weights.reshape(rows, ids.shape[-1]), scale,
        None if y is None else y.reshape(rows, y.shape[-1]), backend=backend,
    )  # fmt: skip
    return out.view(*lead, out.shape[-1])
