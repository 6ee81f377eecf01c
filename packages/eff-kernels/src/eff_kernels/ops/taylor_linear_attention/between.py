"""What reaches a token from earlier chunks, through the features; for backends that compute a chunk by themselves.

Tensors are those of `chunks.by_head`: queries [N, G, T, D], keys [N, T, D], values with ones [N, T, Dv + 1].
"""

from __future__ import annotations

from torch import Tensor

from eff_kernels.ops.taylor_linear_attention.chunks import add, spans
from eff_kernels.ops.taylor_linear_attention.common import features, features_backward


def forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, chunk_size: int, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Numerators and normaliser [N, G, T, Dv + 1] without those of the own chunk, and the state after all."""
    total, before, t = v.new_zeros(*q.shape[:-1], v.size(-1)), state, k.size(1)
    for a, b in spans(0, t, chunk_size):
        if before is not None:
            part = features(q[:, :, a:b].flatten(1, 2)).mT @ before
            total[:, :, a:b] = part.unflatten(1, (-1, b - a))
        if b < t or return_state:
            before = add(before, features(k[:, a:b]) @ v[:, a:b])
    return total, before


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to all three from ``g`` [N, G, T, Dv + 1], that to numerators and normaliser."""
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    before, after, t = state, None, k.size(1)
    for a, b in spans(0, t, chunk_size):
        if before is not None:
            rows = q[:, :, a:b].flatten(1, 2)
            dq[:, :, a:b] = features_backward(rows, before @ g[:, :, a:b].flatten(1, 2).mT).unflatten(1, (-1, b - a))
        if b < t:
            before = add(before, features(k[:, a:b]) @ v[:, a:b])
    for a, b in reversed(list(spans(0, t, chunk_size))):
        if after is not None:
            dk[:, a:b] = features_backward(k[:, a:b], after @ v[:, a:b].mT)
            dv[:, a:b] = features(k[:, a:b]).mT @ after
        if a:
            after = add(after, features(q[:, :, a:b].flatten(1, 2)) @ g[:, :, a:b].flatten(1, 2))
    return dq, dk, dv
