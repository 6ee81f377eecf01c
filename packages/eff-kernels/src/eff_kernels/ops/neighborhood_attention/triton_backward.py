"""Triton kernels of the backward of neighborhood attention. Not yet run on a GPU: compiled and interpreted only.

Weights are computed again from the lse, as in the compiled code. One kernel walks over the keys of a box of queries, as
the forward does, and gives dQ. Another takes a box of keys and walks over the queries that may see it, and gives dK and
dV: there are no atomics, so the bits are always the same. The few additional keys get theirs from plain products.

M: queries. N: keys. D, E: features of keys and of values, padded to powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import INTERPRET
from eff_kernels.ops.neighborhood_attention import triton as forward
from eff_kernels.ops.neighborhood_attention import triton_windows as w
from eff_kernels.ops.neighborhood_attention.args import BackwardArgs


@triton.jit
def _query_kernel(
    q_ptr, k_ptr, v_ptr, more_k_ptr, more_v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, scale, heads, groups, d, e,
    extra, L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    WIDEN: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = T0 * T1 * T2
    g0, p0, n0, g1, p1, n1, g2, p2, n2 = w.places(tl.program_id(0), L0, L1, L2, D0, D1, D2, T0, T1, T2, BM)
    valid_M = (p0 < n0) & (p1 < n1) & (p2 < n2)
    lo0, hi0 = w.window(p0, n0, K0, S0, C0)
    lo1, hi1 = w.window(p1, n1, K1, S1, C1)
    lo2, hi2 = w.window(p2, n2, K2, S2, C2)
    a0, b0 = w.span(lo0, hi0, valid_M)
    a1, b1 = w.span(lo1, hi1, valid_M)
    a2, b2 = w.span(lo2, hi2, valid_M)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    kv = head // (heads // groups)
    tokens = L0 * L1 * L2
    d_D, e_E = tl.arange(0, BD), tl.arange(0, BE)
    row_M = (batch * tokens + w.token(p0, p1, p2, g0, g1, g2, D0, D1, D2, L1, L2)) * heads + head
    q_MD = w.rows(q_ptr, row_M, d, d_D, valid_M, WIDEN)
    grad_ME = w.rows(grad_ptr, row_M, e, e_E, valid_M, WIDEN)
    lse_M = tl.load(lse_ptr + row_M, valid_M, other=0.0) * 1.4426950408889634
    delta_M = tl.load(delta_ptr + row_M, valid_M, other=0.0)
    dq_MD = tl.zeros([BM, BD], tl.float32)
    total = w.size(a0, b0, a1, b1, a2, b2)
    near = tl.cdiv(total, BN)
    for block in range(near + tl.cdiv(extra, BN)):
        c_N = block * BN + tl.arange(0, BN)
        x_N, y_N, z_N = w.inside_box(c_N, a0, a1, a2, b1, b2)
        more_N = (block - near) * BN + tl.arange(0, BN)
        exists_N = tl.where(block < near, c_N < total, more_N < extra)
        seen_MN = w.seen(x_N[None, :], y_N[None, :], z_N[None, :], lo0[:, None], hi0[:, None], lo1[:, None],
                         hi1[:, None], lo2[:, None], hi2[:, None])  # fmt: skip
        seen_MN = exists_N[None, :] & valid_M[:, None] & (seen_MN | (block >= near))
        if block < near:
            row_N = (batch * tokens + w.token(x_N, y_N, z_N, g0, g1, g2, D0, D1, D2, L1, L2)) * groups + kv
            k_ND = w.rows(k_ptr, row_N, d, d_D, exists_N, WIDEN)
            v_NE = w.rows(v_ptr, row_N, e, e_E, exists_N, WIDEN)
        else:
            row_N = (batch * extra + more_N) * groups + kv
            k_ND = w.rows(more_k_ptr, row_N, d, d_D, exists_N, WIDEN)
            v_NE = w.rows(more_v_ptr, row_N, e, e_E, exists_N, WIDEN)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * (scale * 1.4426950408889634)
        weight_MN = tl.where(seen_MN, tl.exp2(score_MN - lse_M[:, None]), 0.0)
        dweight_MN = tl.dot(grad_ME, tl.trans(v_NE), input_precision="ieee")
        dscore_MN = tl.where(seen_MN, weight_MN * (dweight_MN - delta_M[:, None]), 0.0)
        dq_MD = tl.dot(dscore_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")
    tl.store(
        dq_ptr + row_M[:, None] * d + d_D[None, :], (dq_MD * scale).to(dq_ptr.dtype.element_ty),
        valid_M[:, None] & (d_D < d)[None, :],
    )  # fmt: skip


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, scale, heads, groups, d, e,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    WIDEN: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    BK: tl.constexpr = T0 * T1 * T2
    g0, p0, n0, g1, p1, n1, g2, p2, n2 = w.places(tl.program_id(0), L0, L1, L2, D0, D1, D2, T0, T1, T2, BK)
    valid_N = (p0 < n0) & (p1 < n1) & (p2 < n2)
    a0, b0 = w.queries(p0, n0, valid_N, K0, S0, C0)
    a1, b1 = w.queries(p1, n1, valid_N, K1, S1, C1)
    a2, b2 = w.queries(p2, n2, valid_N, K2, S2, C2)
    batch, kv = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    group = heads // groups
    tokens = L0 * L1 * L2
    d_D, e_E = tl.arange(0, BD), tl.arange(0, BE)
    row_N = (batch * tokens + w.token(p0, p1, p2, g0, g1, g2, D0, D1, D2, L1, L2)) * groups + kv
    k_ND = w.rows(k_ptr, row_N, d, d_D, valid_N, WIDEN)
    v_NE = w.rows(v_ptr, row_N, e, e_E, valid_N, WIDEN)
    dk_ND = tl.zeros([BK, BD], tl.float32)
    dv_NE = tl.zeros([BK, BE], tl.float32)
    total = w.size(a0, b0, a1, b1, a2, b2)
    steps = tl.cdiv(total, BN)
    for step in range(steps * group):
        c_M = step % steps * BN + tl.arange(0, BN)
        exists_M = c_M < total
        x_M, y_M, z_M = w.inside_box(c_M, a0, a1, a2, b1, b2)
        lo0, hi0 = w.window(x_M, n0, K0, S0, C0)
        lo1, hi1 = w.window(y_M, n1, K1, S1, C1)
        lo2, hi2 = w.window(z_M, n2, K2, S2, C2)
        seen_NM = w.seen(p0[:, None], p1[:, None], p2[:, None], lo0[None, :], hi0[None, :], lo1[None, :],
                         hi1[None, :], lo2[None, :], hi2[None, :])  # fmt: skip
        seen_NM = exists_M[None, :] & valid_N[:, None] & seen_NM
        token_M = batch * tokens + w.token(x_M, y_M, z_M, g0, g1, g2, D0, D1, D2, L1, L2)
        row_M = token_M * heads + kv * group + step // steps
        q_MD = w.rows(q_ptr, row_M, d, d_D, exists_M, WIDEN)
        grad_ME = w.rows(grad_ptr, row_M, e, e_E, exists_M, WIDEN)
        lse_M = tl.load(lse_ptr + row_M, exists_M, other=0.0) * 1.4426950408889634
        delta_M = tl.load(delta_ptr + row_M, exists_M, other=0.0)
        score_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * (scale * 1.4426950408889634)
        weight_NM = tl.where(seen_NM, tl.exp2(score_NM - lse_M[None, :]), 0.0)
        dv_NE = tl.dot(weight_NM.to(grad_ME.dtype), grad_ME, dv_NE, input_precision="ieee")
        dweight_NM = tl.dot(v_NE, tl.trans(grad_ME), input_precision="ieee")
        dscore_NM = tl.where(seen_NM, weight_NM * (dweight_NM - delta_M[None, :]), 0.0)
        dk_ND = tl.dot(dscore_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee")
    tl.store(
        dk_ptr + row_N[:, None] * d + d_D[None, :], (dk_ND * scale).to(dk_ptr.dtype.element_ty),
        valid_N[:, None] & (d_D < d)[None, :],
    )  # fmt: skip
    tl.store(
        dv_ptr + row_N[:, None] * e + e_E[None, :], dv_NE.to(dv_ptr.dtype.element_ty),
        valid_N[:, None] & (e_E < e)[None, :],
    )  # fmt: skip


def reject(grad: Tensor, grad_lse: Tensor, *args: Any) -> str | None:
    return forward.reject(*args)


def run(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    grad, grad_lse, query, key, value, out, lse = args[:7]
    kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values = args[7:]
    q, k, v, more_k, more_v = (t.contiguous() for t in (query, key, value, additional_keys, additional_values))
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    if query.numel() == 0:
        return dq, dk, dv, torch.zeros_like(more_k), torch.zeros_like(more_v)
    grad, lse = grad.to(query.dtype).contiguous(), lse.contiguous()
    delta = (grad.float() * out.float()).sum(-1) - grad_lse
    lengths, causal = forward.padded(query, (kernel_size, stride, dilation, is_causal))
    heads, groups, d, e = query.size(-2), key.size(-2), query.size(-1), value.size(-1)
    block = _blocks(query.dtype, query.dim() - 3, d, e)
    options = {"C0": causal[0], "C1": causal[1], "C2": causal[2], "WIDEN": INTERPRET}
    _query_kernel[forward.grid(query, lengths, block, heads)](
        q, k, v, more_k, more_v, grad, lse, delta, dq, scale, heads, groups, d, e, more_k.size(1), *lengths,
        **options, **block,
    )  # fmt: skip
    block = _key_blocks(query.dtype, query.dim() - 3, d, e)
    _key_kernel[forward.grid(query, lengths, block, groups)](
        q, k, v, grad, lse, delta, dk, dv, scale, heads, groups, d, e, *lengths, **options, **block
    )
    return dq, dk, dv, *_additional(grad, q, lse, delta, more_k, more_v, scale)


def _additional(
    grad: Tensor, q: Tensor, lse: Tensor, delta: Tensor, more_k: Tensor, more_v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients to the additional keys and values, which all queries see."""
    if more_k.numel() == 0:
        return torch.zeros_like(more_k), torch.zeros_like(more_v)
    heads = (more_k.size(2), -1)
    last = q.dim() - 3  # of the axes of the map
    q, grad, lse, delta = (t.float().flatten(1, last).unflatten(2, heads) for t in (q, grad, lse, delta))
    weights = (scale * torch.einsum("bnhgd,bmhd->bnhgm", q, more_k.float()) - lse[..., None]).exp()
    scores = weights * (torch.einsum("bnhge,bmhe->bnhgm", grad, more_v.float()) - delta[..., None])
    d_k = scale * torch.einsum("bnhgm,bnhgd->bmhd", scores, q)
    d_v = torch.einsum("bnhgm,bnhge->bmhe", weights, grad)
    return d_k.to(more_k.dtype).contiguous(), d_v.to(more_v.dtype).contiguous()


def _blocks(dtype: torch.dtype, rank: int, d: int, e: int) -> dict[str, int]:
    """As for the forward, with half the block: more sums are held."""
    block = forward.blocks(dtype, rank, d, e)
    if dtype == torch.float32:
        return {**block, "BN": 16, "num_warps": 4, "num_stages": 1}
    return {**block, "BN": 32, "num_stages": 1}


def _key_blocks(dtype: torch.dtype, rank: int, d: int, e: int) -> dict[str, int]:
    """Box of keys, and block of queries; long heads have two large sums to hold."""
    block = _blocks(dtype, rank, d, e)
    if max(d, e) > 64:
        small = ((1, 1, 16), (1, 4, 4), (2, 2, 4)) if dtype == torch.float32 else ((1, 1, 32), (1, 4, 8), (2, 4, 4))
        block.update(BN=16, num_warps=8)
        block.update(zip(("T0", "T1", "T2"), small[rank - 1], strict=True))
    return block


_COMMON = ("q_ptr", "k_ptr", "v_ptr", "grad_ptr")
AOT_CASES = [
    *forward.aot_cases(
        _query_kernel, ["lse_ptr", "delta_ptr"], [*_COMMON, "more_k_ptr", "more_v_ptr", "dq_ptr"], _blocks
    ),
    *forward.aot_cases(_key_kernel, ["lse_ptr", "delta_ptr"], [*_COMMON, "dk_ptr", "dv_ptr"], _key_blocks),
]
