"""grouped_lora: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.grouped_lora import autograd, cpu, reference


def _fake(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, weights: Any, scale: Any, y: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], b.shape[1]), dtype=x.dtype if y is None else y.dtype)


OP = Op(
    "grouped_lora",
    "(Tensor x, Tensor a, Tensor b, Tensor ids, Tensor? weights, Tensor? scale, Tensor? y) -> Tensor",
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
        ids: Experts of each row, [..., k], int32 or int64; -1 is none. An expert may stand in several places.
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
    shape = x.shape
    if a.dim() != 3 or b.dim() != 3 or a.shape[:2] != (b.shape[0], b.shape[2]):
        raise ValueError(f"a [E, R, K] and b [E, N, R] do not fit: got {list(a.shape)} and {list(b.shape)}")
    if not shape or shape[-1] != a.shape[2]:
        raise ValueError(f"x must have shape [..., {a.shape[2]}] for a of shape {list(a.shape)}, got {list(shape)}")
    lead, (num_experts, n, _) = shape[:-1], b.shape
    if not ids.dim() or ids.shape[:-1] != lead:
        raise ValueError(f"ids must have shape {[*lead, 'k']} for x of shape {list(shape)}, got {list(ids.shape)}")
    if weights is not None and weights.shape != ids.shape:
        raise ValueError(f"weights must be of the shape of ids, {list(ids.shape)}, got {list(weights.shape)}")
    if scale is not None and scale.shape != (num_experts,):
        raise ValueError(f"scale must have shape [{num_experts}], got {list(scale.shape)}")
    if y is not None and y.shape != (*lead, n):
        raise ValueError(f"y must have shape {[*lead, n]}, got {list(y.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
    if a.dtype != b.dtype:
        raise TypeError(f"a and b must have one dtype, got {a.dtype} and {b.dtype}")
    for name, tensor in (("x", x), ("a", a), ("weights", weights), ("scale", scale), ("y", y)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must have a float dtype, got {tensor.dtype}")
    if len(shape) == 2:
        return OP(x, a, b, ids, weights, scale, y, backend=backend)
    rows = lead.numel()
    out = OP(
        x.reshape(rows, shape[-1]), a, b, ids.reshape(rows, ids.shape[-1]),
        None if weights is None else weights.reshape(rows, ids.shape[-1]), scale,
        None if y is None else y.reshape(rows, n), backend=backend,
    )  # fmt: skip
    return out.view(*lead, n)
