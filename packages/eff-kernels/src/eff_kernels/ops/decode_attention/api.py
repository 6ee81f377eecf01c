"""decode_attention: checks of the arguments, then dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.decode_attention import cpu, reference

OP = Op(
    "decode_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? block_table, float scale) -> Tensor",
    [
        Backend("cpu", cpu.decode_attention, cpu.reject),
        triton_backend("eff_kernels.ops.decode_attention.triton"),
        Backend("reference", reference.decode_attention),
    ],
    fake=lambda q, k, v, lengths, block_table, scale: q.new_empty(q.shape),
)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from one query per sequence to the keys and values of its cache.

    out[b, h] = softmax(scale * q[b, h] . k[b, h // (H / KV), :lengths[b]]) v[...], computed in float32. Inference only.

    Args:
        q: Queries, [B, H, D]; any float dtype.
        k: Keys, [B, KV, S, D], or the pages of a paged cache, [P, KV, page, D]; H must be a multiple of KV, and
            query head h reads key-value head h // (H / KV). The dtype may differ from that of ``q``.
        v: Values, like ``k``.
        lengths: Number of keys of each sequence, int32 [B]; with 0 the output is zero.
        block_table: For a paged cache, int32 [B, max_pages]: key j of sequence b is row j % page of page
            block_table[b, j // page]. Entries beyond the length are not read.
        scale: Factor of the scores; D ** -0.5 by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [B, H, D] of the dtype of ``q``.

    Raises:
        ValueError: shapes do not fit, or, on the CPU, a length or a page number lies outside the cache.
        TypeError: a dtype is not as stated.
        BackendError: the named backend cannot run this call; the message says why.
    """
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or k.size(3) != q.size(2):
        raise ValueError(
            f"q [B, H, D], k and v [B, KV, S, D] do not fit: got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    batch, heads, d = q.shape
    if k.size(1) == 0 or heads % k.size(1):
        raise ValueError(f"the number of query heads, {heads}, must be a multiple of the key-value heads, {k.size(1)}")
    if not (q.is_floating_point() and k.is_floating_point()) or k.dtype != v.dtype:
        raise TypeError(f"q, k and v must have float dtypes, k and v the same; got {q.dtype}, {k.dtype} and {v.dtype}")
    if lengths.dtype != torch.int32 or (block_table is not None and block_table.dtype != torch.int32):
        seen = lengths.dtype if block_table is None else f"{lengths.dtype} and {block_table.dtype}"
        raise TypeError(f"lengths and block_table must be int32, got {seen}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape [{batch}], got {list(lengths.shape)}")
    if block_table is None:
        if k.size(0) != batch:
            raise ValueError(f"k and v must hold {batch} sequences, as q does, got {k.size(0)}")
    elif block_table.dim() != 2 or block_table.size(0) != batch:
        raise ValueError(f"block_table must have shape [{batch}, max_pages], got {list(block_table.shape)}")
    return OP(q, k, v, lengths, block_table, d**-0.5 if scale is None else float(scale), backend=backend)
