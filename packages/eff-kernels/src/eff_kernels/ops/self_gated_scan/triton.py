"""Triton kernels of self_gated_scan. Not yet run on a GPU: compiled and interpreted only.

A program takes the tokens of one head block by block; within a block the weights are a matrix, between blocks there
are the mean, the sum and the highest score.

M: tokens of a block. N: keys of a block, or later tokens in the backward. E: features, padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import INTERPRET, AotCase
from eff_kernels.ops.self_gated_scan.args import Args, BackwardArgs
from eff_kernels.ops.self_gated_scan.common import empty_state

_LONGEST_HEAD = 256
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _finite(top):
    """0 where no key was seen yet."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _forward_kernel(
    score_ptr, v_ptr, out_ptr, tops_ptr, totals_ptr, before_ptr, after_ptr, heads, kv_heads, tokens, e,
    BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv = row // heads * kv_heads + row % heads // (heads // kv_heads)
    e_E, m_M = tl.arange(0, BE), tl.arange(0, BM)
    before_ptr += row * (e + 2)
    mean_E = tl.load(before_ptr + e_E, e_E < e, other=0.0)
    total, top = tl.load(before_ptr + e), tl.load(before_ptr + e + 1)
    for start in range(0, tokens, BM):
        t_M = start + m_M
        s_N = tl.load(score_ptr + row * tokens + t_M, t_M < tokens, other=float("-inf")).to(tl.float32)
        at_ME = t_M[:, None] * e + e_E[None, :]
        valid_ME = (t_M < tokens)[:, None] & (e_E < e)[None, :]
        v_NE = tl.load(v_ptr + kv * tokens * e + at_ME, valid_ME, other=0.0).to(tl.float32)
        s_MN = tl.where(m_M[None, :] <= m_M[:, None], s_N[None, :], float("-inf"))
        top_M = tl.maximum(tl.max(s_MN, 1), top)
        base_M = _finite(top_M)
        weight_MN = tl.exp2((s_MN - base_M[:, None]) * _LOG2E)
        past_M = total * tl.exp2((top - base_M) * _LOG2E)
        total_M = tl.sum(weight_MN, 1) + past_M
        out_ME = tl.dot(weight_MN, v_NE, past_M[:, None] * mean_E[None, :], input_precision="ieee")
        out_ME /= tl.where(total_M == 0, 1.0, total_M)[:, None]
        tl.store(out_ptr + row * tokens * e + at_ME, out_ME.to(out_ptr.dtype.element_ty), valid_ME)
        tl.store(tops_ptr + row * tokens + t_M, top_M, t_M < tokens)
        tl.store(totals_ptr + row * tokens + t_M, total_M, t_M < tokens)
        last_M = m_M == tl.minimum(BM, tokens - start) - 1
        mean_E = tl.sum(tl.where(last_M[:, None], out_ME, 0.0), 0)
        total = tl.sum(tl.where(last_M, total_M, 0.0), 0)
        top = tl.max(tl.where(last_M, top_M, float("-inf")), 0)
    after_ptr += row * (e + 2)
    tl.store(after_ptr + e_E, mean_E, e_E < e)
    tl.store(after_ptr + e, total)
    tl.store(after_ptr + e + 1, top)


@triton.jit
def _backward_kernel(
    grad_ptr, score_ptr, v_ptr, out_ptr, tops_ptr, totals_ptr, dscore_ptr, dv_ptr, heads, kv_heads, tokens, e,
    BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv = row // heads * kv_heads + row % heads // (heads // kv_heads)
    e_E, m_M = tl.arange(0, BE), tl.arange(0, BM)
    pull_E = tl.zeros([BE], tl.float32)  # gradient to the running mean after the block
    mass = 0.0  # sum of weights times grad . out after the block
    next_top, next_total = float("inf"), 1.0
    blocks = tl.cdiv(tokens, BM)
    for back in range(blocks):
        t_M = (blocks - 1 - back) * BM + m_M
        valid_M = t_M < tokens
        at_ME = t_M[:, None] * e + e_E[None, :]
        valid_ME = valid_M[:, None] & (e_E < e)[None, :]
        s_M = tl.load(score_ptr + row * tokens + t_M, valid_M, other=float("-inf")).to(tl.float32)
        top_M = tl.load(tops_ptr + row * tokens + t_M, valid_M, other=0.0)
        total_M = tl.load(totals_ptr + row * tokens + t_M, valid_M, other=0.0)
        v_ME = tl.load(v_ptr + kv * tokens * e + at_ME, valid_ME, other=0.0).to(tl.float32)
        g_NE = tl.load(grad_ptr + row * tokens * e + at_ME, valid_ME, other=0.0).to(tl.float32)
        o_NE = tl.load(out_ptr + row * tokens * e + at_ME, valid_ME, other=0.0).to(tl.float32)
        safe_M = tl.where(total_M == 0, 1.0, total_M)
        later_MN = (m_M[None, :] >= m_M[:, None]) & valid_M[None, :]
        fall_MN = tl.where(later_MN, top_M[:, None] - _finite(top_M)[None, :], float("-inf"))
        keep_MN = tl.exp2(fall_MN * _LOG2E) * (total_M[:, None] / safe_M[None, :])
        keep_M = tl.exp2((top_M - next_top) * _LOG2E) * (total_M / next_total)
        pull_ME = tl.dot(keep_MN, g_NE, keep_M[:, None] * pull_E[None, :], input_precision="ieee")
        along_N = tl.sum(g_NE * o_NE, 1)
        mass_M = tl.sum(keep_MN * along_N[None, :], 1) + keep_M * mass
        gate_M = tl.exp2((s_M - _finite(top_M)) * _LOG2E) / safe_M
        tl.store(dv_ptr + row * tokens * e + at_ME, gate_M[:, None] * pull_ME, valid_ME)
        tl.store(dscore_ptr + row * tokens + t_M, gate_M * (tl.sum(pull_ME * v_ME, 1) - mass_M), valid_M)
        pull_E = tl.sum(tl.where((m_M == 0)[:, None], pull_ME, 0.0), 0)
        mass = tl.sum(tl.where(m_M == 0, mass_M, 0.0), 0)
        next_top = tl.sum(tl.where(m_M == 0, _finite(top_M), 0.0), 0)
        next_total = tl.sum(tl.where(m_M == 0, safe_M, 0.0), 0)


def reject(score: Tensor, v: Tensor, *args: Any) -> str | None:
    """Why the kernel cannot run this call."""
    half = (torch.float32, torch.bfloat16, torch.float16)
    if v.dtype not in half or score.dtype not in half:
        return f"takes float32, bfloat16 and float16, got score in {score.dtype} and v in {v.dtype}"
    if v.size(-1) > _LONGEST_HEAD:
        return f"takes up to {_LONGEST_HEAD} features, got {v.size(-1)}"
    return None


def reject_backward(grad: Tensor, score: Tensor, v: Tensor, *args: Any) -> str | None:
    """Why the kernel cannot run this call."""
    return reject(score, v)


def run(*args: *Args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    score, v, state, return_state = args
    out = v.new_empty(*score.shape, v.size(-1), dtype=torch.float32 if INTERPRET else v.dtype)  # it would truncate
    tops, totals = (score.new_empty(score.shape, dtype=torch.float32) for _ in range(2))
    before = empty_state(score, v) if state is None else state.float().contiguous()
    after = torch.empty_like(before)
    if before.numel():
        _forward_kernel[(score.size(0) * score.size(1),)](
            score.contiguous(), v.contiguous(), out, tops, totals, before, after,
            score.size(1), v.size(1), score.size(2), v.size(3), **blocks(v.size(3)),
        )  # fmt: skip
    return out.to(v.dtype), tops, totals, after if return_state else after.new_empty(0)


def backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    """As the reference."""
    grad, score, v, out, tops, totals, *_ = args
    dscore = score.new_empty(score.shape, dtype=torch.float32)
    dv = v.new_empty(out.shape, dtype=torch.float32)
    if dscore.numel():
        _backward_kernel[(score.size(0) * score.size(1),)](
            grad.contiguous(), score.contiguous(), v.contiguous(), out, tops, totals, dscore, dv,
            score.size(1), v.size(1), score.size(2), v.size(3), **blocks(v.size(3)),
        )  # fmt: skip
    if v.size(1) != score.size(1):
        dv = dv.unflatten(1, (v.size(1), -1)).sum(2)
    return dscore.to(score.dtype), dv.to(v.dtype)


def blocks(e: int) -> dict[str, int]:
    """Tokens of a block and padded features."""
    return {"BM": 32 if e <= 64 else 16, "BE": max(16, triton.next_power_of_2(e)), "num_warps": 4 if e <= 64 else 8}


def _cases(kernel: Any) -> list[AotCase]:
    cases = []
    for name, e in (("bf16", 64), ("fp16", 128), ("fp32", 256)):
        block = blocks(e)
        options = {"num_warps": block.pop("num_warps")}
        wide = ("tops_ptr", "totals_ptr", "before_ptr", "after_ptr", "dscore_ptr", "dv_ptr", "score_ptr")
        signature = {
            n: ("*fp32" if n in wide else f"*{name}") if n.endswith("_ptr") else "i32"
            for n in kernel.arg_names
            if n not in block
        }
        integers = ("heads", "kv_heads", "tokens")
        title = f"{kernel.fn.__name__}-{name}-e{e}"
        cases.append(
            AotCase(
                name=title, kernel=kernel, signature=signature, constexprs=block, options=options, unaligned=integers
            )
        )
    return cases


AOT_CASES = [*_cases(_forward_kernel), *_cases(_backward_kernel)]
