"""Triton kernels of Taylor attention. Not yet run on a GPU: compiled and interpreted only.

A program takes a block of queries (in the gradient to keys: of keys) and walks over the rest of its chunk. What comes
from other chunks is added by matrix products over the features (`between`).

M: queries of a block. N: keys of a block. D, E: features of keys and of values, padded to powers of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import INTERPRET, AotCase
from eff_kernels.ops.taylor_linear_attention import between
from eff_kernels.ops.taylor_linear_attention.args import Args, BackwardArgs
from eff_kernels.ops.taylor_linear_attention.chunks import by_head, mask_by_head
from eff_kernels.ops.taylor_linear_attention.common import numerator_gradient, taylor_state_shape

_LONGEST_HEAD = 64
_BLOCK = 64  # chunks are multiples of it


@triton.jit
def _rows(ptr, first, at_M, tokens, d, d_D, WIDEN: tl.constexpr):
    """Rows ``at_M`` of a head, zeros outside."""
    x = tl.load(
        ptr + (first + at_M)[:, None] * d + d_D[None, :], (at_M < tokens)[:, None] & (d_D < d)[None, :], other=0.0
    )
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def _seen(mask_ptr, batch, m_M, n_N, tokens, MASKED: tl.constexpr):
    seen_MN = (n_N[None, :] <= m_M[:, None]) & (n_N < tokens)[None, :] & (m_M < tokens)[:, None]
    if MASKED:
        seen_MN &= (tl.load(mask_ptr + batch * tokens + n_N, n_N < tokens, other=0) != 0)[None, :]
    return seen_MN


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, base_ptr, out_ptr, norm_ptr, scale, heads, kv_heads, tokens, chunk, d, e,
    MASKED: tl.constexpr, BASE: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    first_m, row = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    batch = row // heads
    kv = batch * kv_heads + row % heads // (heads // kv_heads)
    d_D, e_E, m_M = tl.arange(0, BD), tl.arange(0, BE), first_m + tl.arange(0, BM)
    q_MD = _rows(q_ptr, row * tokens, m_M, tokens, d, d_D, WIDEN)
    out_ME, norm_M = tl.zeros([BM, BE], tl.float32), tl.zeros([BM], tl.float32)
    for n in range(first_m // chunk * chunk, first_m + BM, BM):
        n_N = n + tl.arange(0, BM)
        k_ND = _rows(k_ptr, kv * tokens, n_N, tokens, d, d_D, WIDEN)
        v_NE = _rows(v_ptr, kv * tokens, n_N, tokens, e, e_E, WIDEN)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        weight_MN = tl.where(_seen(mask_ptr, batch, m_M, n_N, tokens, MASKED), 1 + s_MN * (1 + 0.5 * s_MN), 0.0)
        norm_M += tl.sum(weight_MN, 1)
        out_ME = tl.dot(weight_MN.to(v_NE.dtype), v_NE, out_ME, input_precision="ieee")
    valid_ME = (m_M < tokens)[:, None] & (e_E < e)[None, :]
    if BASE:
        base_M = base_ptr + (row * tokens + m_M) * (e + 1)
        out_ME += tl.load(base_M[:, None] + e_E[None, :], valid_ME, other=0.0)
        norm_M += tl.load(base_M + e, m_M < tokens, other=0.0)
    out_ME /= tl.where(norm_M == 0, 1.0, norm_M)[:, None]
    at_ME = (row * tokens + m_M)[:, None] * e + e_E[None, :]
    tl.store(out_ptr + at_ME, out_ME.to(out_ptr.dtype.element_ty), valid_ME)
    tl.store(norm_ptr + row * tokens + m_M, norm_M, m_M < tokens)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, g_ptr, gnorm_ptr, dq_ptr, scale, heads, kv_heads, tokens, chunk, d, e,
    MASKED: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    first_m, row = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    batch = row // heads
    kv = batch * kv_heads + row % heads // (heads // kv_heads)
    d_D, e_E, m_M = tl.arange(0, BD), tl.arange(0, BE), first_m + tl.arange(0, BM)
    q_MD = _rows(q_ptr, row * tokens, m_M, tokens, d, d_D, WIDEN)
    g_ME = _rows(g_ptr, row * tokens, m_M, tokens, e, e_E, WIDEN).to(q_MD.dtype)
    gnorm_M = tl.load(gnorm_ptr + row * tokens + m_M, m_M < tokens, other=0.0)
    dq_MD = tl.zeros([BM, BD], tl.float32)
    for n in range(first_m // chunk * chunk, first_m + BM, BM):
        n_N = n + tl.arange(0, BM)
        k_ND = _rows(k_ptr, kv * tokens, n_N, tokens, d, d_D, WIDEN)
        v_NE = _rows(v_ptr, kv * tokens, n_N, tokens, e, e_E, WIDEN)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        ds_MN = (tl.dot(g_ME, tl.trans(v_NE), input_precision="ieee") + gnorm_M[:, None]) * (1 + s_MN)
        ds_MN = tl.where(_seen(mask_ptr, batch, m_M, n_N, tokens, MASKED), ds_MN, 0.0)
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")
    at_MD = (row * tokens + m_M)[:, None] * d + d_D[None, :]
    tl.store(dq_ptr + at_MD, dq_MD, (m_M < tokens)[:, None] & (d_D < d)[None, :])


@triton.jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, g_ptr, gnorm_ptr, dk_ptr, dv_ptr, scale, heads, kv_heads, tokens, chunk, d, e,
    MASKED: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    first_n, kv = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    batch, groups = kv // kv_heads, heads // kv_heads
    d_D, e_E, n_N = tl.arange(0, BD), tl.arange(0, BE), first_n + tl.arange(0, BM)
    k_ND = _rows(k_ptr, kv * tokens, n_N, tokens, d, d_D, WIDEN)
    v_NE = _rows(v_ptr, kv * tokens, n_N, tokens, e, e_E, WIDEN)
    dk_ND, dv_NE = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BE], tl.float32)
    stop = tl.minimum(tokens, (first_n // chunk + 1) * chunk)
    steps = tl.cdiv(stop - first_n, BM)
    for step in range(groups * steps):
        row = kv * groups + step // steps
        m_M = first_n + step % steps * BM + tl.arange(0, BM)
        q_MD = _rows(q_ptr, row * tokens, m_M, tokens, d, d_D, WIDEN)
        g_ME = _rows(g_ptr, row * tokens, m_M, tokens, e, e_E, WIDEN).to(q_MD.dtype)
        gnorm_M = tl.load(gnorm_ptr + row * tokens + m_M, m_M < tokens, other=0.0)
        seen_MN = _seen(mask_ptr, batch, m_M, n_N, tokens, MASKED)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        weight_MN = tl.where(seen_MN, 1 + s_MN * (1 + 0.5 * s_MN), 0.0)
        dv_NE = tl.dot(tl.trans(weight_MN.to(g_ME.dtype)), g_ME, dv_NE, input_precision="ieee")
        ds_MN = (tl.dot(g_ME, tl.trans(v_NE), input_precision="ieee") + gnorm_M[:, None]) * (1 + s_MN)
        ds_MN = tl.where(seen_MN, ds_MN, 0.0)
        dk_ND = tl.dot(tl.trans(ds_MN.to(q_MD.dtype)), q_MD, dk_ND, input_precision="ieee")
    row_N = kv * tokens + n_N
    tl.store(dk_ptr + row_N[:, None] * d + d_D[None, :], dk_ND, (n_N < tokens)[:, None] & (d_D < d)[None, :])
    tl.store(dv_ptr + row_N[:, None] * e + e_E[None, :], dv_NE, (n_N < tokens)[:, None] & (e_E < e)[None, :])


def reject(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    """Why the kernels cannot run this call."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {q.dtype}"
    if max(q.size(-1), v.size(-1)) > _LONGEST_HEAD:
        return f"takes head dimensions up to {_LONGEST_HEAD}, got {q.size(-1)} and {v.size(-1)}"
    return None


def reject_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    """Why the kernels cannot run this call."""
    return reject(q, k, v)


def run(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    q, k, v, key_mask, chunk_size, scale, state, return_state = args
    chunk, t = _whole_blocks(chunk_size), q.size(2)
    out = q.new_empty(*q.shape[:-1], v.size(-1), dtype=torch.float32 if INTERPRET else q.dtype)  # it would truncate
    norm = q.new_empty(q.shape[:-1], dtype=torch.float32)
    base, final, apart = norm, norm.new_zeros(taylor_state_shape(k, v) if return_state else 0), state is not None
    if t > chunk or state is not None or return_state:
        q_, k_, v_, before = by_head(q, k, v, key_mask, scale, state)
        base, after = between.forward(q_, k_, v_, before, chunk, return_state)
        apart = True
        if return_state and after is not None:
            final = after.view(final.shape)
    if out.numel():
        tensors = (q.contiguous(), k.contiguous(), v.contiguous(), q if key_mask is None else _bytes(key_mask))
        block = blocks(q.dtype, q.size(-1), v.size(-1))
        _forward_kernel[(triton.cdiv(t, block["BM"]), q.size(0) * q.size(1))](
            *tensors, base, out, norm, scale, q.size(1), k.size(1), t, chunk, q.size(3), v.size(3),
            MASKED=key_mask is not None, BASE=apart, WIDEN=INTERPRET, **block,
        )  # fmt: skip
    return out.to(q.dtype), norm, final


def backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    grad, q, k, v, out, norm, key_mask, chunk_size, scale, state = args
    chunk, t = _whole_blocks(chunk_size), q.size(2)
    g = numerator_gradient(grad, out, norm)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    if g.numel() and q.numel():
        block = blocks(q.dtype, q.size(-1), v.size(-1))
        masked = key_mask is not None
        mask = q if key_mask is None else _bytes(key_mask)
        gradients = (g[..., :-1].contiguous(), g[..., -1].contiguous())
        tensors = (q.contiguous(), k.contiguous(), v.contiguous(), mask, *gradients)
        sizes = (scale, q.size(1), k.size(1), t, chunk, q.size(3), v.size(3))
        steps = triton.cdiv(t, block["BM"])
        _dq_kernel[(steps, q.size(0) * q.size(1))](*tensors, dq, *sizes, MASKED=masked, WIDEN=INTERPRET, **block)
        _dkv_kernel[(steps, k.size(0) * k.size(1))](*tensors, dk, dv, *sizes, MASKED=masked, WIDEN=INTERPRET, **block)
        dk *= scale
    if t > chunk or state is not None:
        q_, k_, v_, before = by_head(q, k, v, key_mask, scale, state)
        more = between.backward(q_, k_, v_, g.view(*q_.shape[:-1], v.size(-1) + 1), before, chunk)
        dq, dk = dq + more[0].view(q.shape), dk + more[1].view(k.shape)
        more_v = more[2][..., :-1] if key_mask is None else more[2][..., :-1] * mask_by_head(key_mask, k)
        dv = dv + more_v.view(v.shape)
    return (dq * scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def blocks(dtype: torch.dtype, d: int, e: int) -> dict[str, int]:
    """Queries and keys of a block, padded features."""
    sizes = {"BD": max(16, triton.next_power_of_2(d)), "BE": max(16, triton.next_power_of_2(e))}
    return {"BM": 32, **sizes, "num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 1}


def _whole_blocks(chunk_size: int) -> int:
    return triton.cdiv(chunk_size, _BLOCK) * _BLOCK


def _bytes(mask: Tensor) -> Tensor:
    return mask.to(torch.int8).contiguous()


def _cases(kernel: Any) -> list[AotCase]:
    cases = []
    for name, dtype, d in (("bf16", torch.bfloat16, 64), ("fp16", torch.float16, 16), ("fp32", torch.float32, 64)):
        block = blocks(dtype, d, d)
        options = {key: block.pop(key) for key in ("num_warps", "num_stages")}
        given = {"MASKED": d == 64, "WIDEN": False, **block, **({"BASE": True} if "BASE" in kernel.arg_names else {})}
        kinds = {"mask_ptr": "*i8", "scale": "fp32", **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{name}")}
        kinds["out_ptr"] = f"*{name}"
        signature = {
            n: kinds.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in kernel.arg_names if n not in given
        }
        title = f"{kernel.fn.__name__}-{name}-d{d}"
        sizes = ("heads", "kv_heads", "tokens")
        case = AotCase(
            name=title, kernel=kernel, signature=signature, constexprs=given, options=options, unaligned=sizes
        )
        cases.append(replace(case, mma=None if name == "fp32" else "any"))
    return cases


AOT_CASES = [*_cases(_forward_kernel), *_cases(_dq_kernel), *_cases(_dkv_kernel)]
