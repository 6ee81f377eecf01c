"""taylor_linear_attention: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.taylor_linear_attention import chunks, reference
from eff_kernels.ops.taylor_linear_attention.args import Args, check
from eff_kernels.ops.taylor_linear_attention.autograd import backward, setup_context
from eff_kernels.ops.taylor_linear_attention.common import taylor_state_shape


class TaylorAttentionOutput(NamedTuple):
    """What `taylor_linear_attention` returns.

    Attributes:
        output: [B, H, T, Dv] of the dtype of q.
        state: [B, Hkv, F, Dv + 1] in float32 if it was asked for, else None.
    """

    output: Tensor
    state: Tensor | None


def _allocate(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, *_, keep = args
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = taylor_state_shape(k, v) if keep else (0,)
    norm, final = q.new_empty(q.shape[:-1], dtype=wide), q.new_empty(shape, dtype=wide)
    return q.new_empty(*q.shape[:-1], v.size(-1)), norm, final


OP = Op(
    "taylor_linear_attention",
    schema_of(Args, "(Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", chunks.forward, chunks.reject),
        triton_backend("eff_kernels.ops.taylor_linear_attention.triton"),
        Backend("reference", reference.taylor_linear_attention),
    ],
    fake=_allocate,
    setup_context=setup_context,
    backward=backward,
)


def taylor_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> TaylorAttentionOutput:
    """Causal attention whose weights are the Taylor polynomial of exp instead of exp.

    output[i] = sum_{j <= i} w_ij v[j] / sum_{j <= i} w_ij, with w_ij = 1 + s_ij + s_ij^2 / 2 and s_ij = scale q[i] .
    k[j], in float32. A weight is never below 1/2. As w_ij = f(scale q[i]) . f(k[j]) for F = 1 + D + D (D + 1) / 2
    features, the past is one matrix a head, and time is linear in the tokens.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, T, D]; H must be a multiple of Hkv, and query head h reads key-value head h // (H / Hkv).
        v: [B, Hkv, T, Dv].
        key_mask: bool [B, T]; False hides a key. A query with no key to see gives zeros.
        chunk_size: Tokens whose weights are computed as a matrix; more go through the features. None takes what is
            less work: the whole sequence, or 256. It changes rounding alone.
        scale: Factor of the scores; D ** -0.5 by default.
        state: That of an earlier call, over the tokens before these. It is not changed, and carries no gradient.
        return_state: Whether to return the state after these tokens.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Raises:
        ValueError: shapes do not fit, or the state requires a gradient.
        TypeError: a dtype is not as stated.
        BackendError: the named backend cannot run this call; the message says why.
    """
    check(q, k, v, key_mask, state)
    if chunk_size is None:
        chunk_size = chunks.pick_chunk(q.size(2), q.size(3), v.size(3))
    elif chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    scale = q.size(-1) ** -0.5 if scale is None else float(scale)
    out, _, final = OP(q, k, v, key_mask, chunk_size, scale, state, return_state, backend=backend)
    return TaylorAttentionOutput(out, final if return_state else None)
