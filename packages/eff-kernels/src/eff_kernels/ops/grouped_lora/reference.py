"""grouped_lora in plain PyTorch, one expert after the other; in float32, or float64 for float64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.grouped_lora.args import Args, BackwardArgs
from eff_kernels.ops.grouped_lora.common import wrong_ids


def grouped_lora(*args: *Args) -> Tensor:
    """Out [T, N] of x [T, K], a [E, R, K], b [E, N, R], ids and weights [T, k], scale [E], y [T, N]."""
    x, a, b, ids, weights, scale, y = args
    check_ids(ids, a.shape[0])
    wide = _wide(x, a)
    gates = gates_of(ids, weights, scale, wide)
    out = x.new_zeros((x.shape[0], b.shape[1]), dtype=wide) if y is None else y.to(wide)
    for expert in range(a.shape[0]):
        rows, places = (ids == expert).nonzero(as_tuple=True)
        low = x[rows].to(wide) @ a[expert].to(wide).t()
        out = out.index_add(0, rows, (gates[rows, places, None] * low) @ b[expert].to(wide).t())
    return out.to(x.dtype if y is None else y.dtype).contiguous()


def grouped_lora_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, a, b and weights; those to a and b are empty unless ``experts``.

    With h = a[e] x, u = b[e]^T dy and the gate g = weight * scale, summed over the rows and places of expert e:
    dx = g a[e]^T u, da[e] = g u x^T, db[e] = g dy h^T, dweight = scale * (u . h).
    """
    grad, x, a, b, ids, weights, scale, experts = args
    wide = _wide(x, a)
    gates, factor = gates_of(ids, weights, scale, wide), gates_of(ids, None, scale, wide)
    upper, rows_in = grad.to(wide), x.to(wide)
    dx, dweights = torch.zeros_like(rows_in), torch.zeros_like(gates)
    da, db = (torch.zeros_like(t if experts else t[:0], dtype=wide) for t in (a, b))
    for expert in range(a.shape[0]):
        rows, places = (ids == expert).nonzero(as_tuple=True)
        first, second = a[expert].to(wide), b[expert].to(wide)
        low, pull = rows_in[rows] @ first.t(), upper[rows] @ second
        dweights[rows, places] = factor[rows, places] * (low * pull).sum(1)
        gated = gates[rows, places, None] * pull
        dx.index_add_(0, rows, gated @ first)
        if experts:
            da[expert] = gated.t() @ rows_in[rows]
            db[expert] = upper[rows].t() @ (gates[rows, places, None] * low)
    return (
        dx.to(x.dtype).contiguous(), da.to(a.dtype).contiguous(), db.to(b.dtype).contiguous(),
        dweights.to(x.dtype if weights is None else weights.dtype).contiguous(),
    )  # fmt: skip


def gates_of(ids: Tensor, weights: Tensor | None, scale: Tensor | None, wide: torch.dtype) -> Tensor:
    """Weight times scale of each place, [T, k]; what stands at ids of -1 is of no meaning."""
    gates = ids.new_ones(ids.shape, dtype=wide) if weights is None else weights.to(wide)
    return gates if scale is None else gates * scale.to(wide)[ids.clamp(min=0)]


def check_ids(ids: Tensor, num_experts: int) -> None:
    """Refuse ids that name no expert."""
    if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < num_experts):
        raise IndexError(wrong_ids(ids, num_experts))


def _wide(x: Tensor, a: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, a.dtype), torch.float32)
