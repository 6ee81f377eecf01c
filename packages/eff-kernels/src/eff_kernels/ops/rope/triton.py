"""Triton kernel of rope: a program turns a block of heads of one token, so that the angles are read once for them.

H: heads of a program, P: pairs, K: features that are copied; all padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import AotCase
from eff_kernels.ops.rope.args import Args


@triton.jit
def _rope_kernel(
    x_ptr, x_batch, x_head, x_token, cos_ptr, sin_ptr, table_batch, out_ptr, heads, tokens, d, pairs,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, H: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head_H = tl.program_id(1) * H + tl.arange(0, H)
    in_heads_H1 = (head_H < heads)[:, None]
    from_H1 = (x_ptr + batch * x_batch + token * x_token + head_H.to(tl.int64) * x_head)[:, None]
    to_H1 = (out_ptr + ((batch * heads + head_H) * tokens + token) * d)[:, None]

    pair_P = tl.arange(0, P)
    table_P = batch * table_batch + token * pairs + pair_P
    cos_1P = tl.load(cos_ptr + table_P, pair_P < pairs, other=0.0)[None, :]
    sin_1P = tl.load(sin_ptr + table_P, pair_P < pairs, other=0.0)[None, :]
    if INVERSE:
        sin_1P = -sin_1P
    mask_HP = in_heads_H1 & (pair_P < pairs)[None, :]
    if INTERLEAVED:
        first_1P, second_1P = (2 * pair_P)[None, :], (2 * pair_P + 1)[None, :]
    else:
        first_1P, second_1P = pair_P[None, :], (pair_P + pairs)[None, :]
    a_HP = tl.load(from_H1 + first_1P, mask_HP, other=0.0).to(tl.float32)
    b_HP = tl.load(from_H1 + second_1P, mask_HP, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(to_H1 + first_1P, (a_HP * cos_1P - b_HP * sin_1P).to(dtype), mask_HP)
    tl.store(to_H1 + second_1P, (b_HP * cos_1P + a_HP * sin_1P).to(dtype), mask_HP)

    if K > 0:
        kept_1K = (2 * pairs + tl.arange(0, K))[None, :]
        mask_HK = in_heads_H1 & (kept_1K < d)
        tl.store(to_H1 + kept_1K, tl.load(from_H1 + kept_1K, mask_HK, other=0.0), mask_HK)


def reject(*args: *Args) -> str | None:
    x, *_ = args
    if x.element_size() == 8:
        return f"computes in float32, got {x.dtype}"
    if x.size(3) > 4096:
        return f"keeps a head in registers, at most 4096 features, got {x.size(3)}"
    return None


def run(*args: *Args) -> Tensor:
    x, cos, sin, interleaved, inverse = args
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    if x.stride(3) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, d = x.shape
    pairs = cos.size(2)
    block = _block(heads, d, pairs)
    _rope_kernel[(batch * tokens, triton.cdiv(heads, block["H"]))](
        x, x.stride(0), x.stride(1), x.stride(2), cos, sin, 0 if cos.size(0) == 1 else tokens * pairs, out,
        heads, tokens, d, pairs, INTERLEAVED=interleaved, INVERSE=inverse, **block,
    )  # fmt: skip
    return out


def _block(heads: int, d: int, pairs: int) -> dict[str, int]:
    """Heads so that a program turns about 2048 features."""
    kept = d - 2 * pairs
    width = triton.next_power_of_2(max(d, 1))
    return {
        "H": min(triton.next_power_of_2(heads), max(1, 2048 // width)),
        "P": triton.next_power_of_2(max(pairs, 1)),
        "K": triton.next_power_of_2(kept) if kept else 0,
    }


def _aot_cases() -> list[AotCase]:
    shapes = {"heads-64": (9, 64, 32), "heads-128": (32, 128, 64), "part": (32, 80, 16), "wide": (1, 4096, 2048)}
    return [
        AotCase(
            name=f"{name}-{dtype}-interleaved{interleaved:d}",
            kernel=_rope_kernel,
            signature={
                **dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}"),
                **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
                **dict.fromkeys(
                    ("x_batch", "x_head", "x_token", "table_batch", "heads", "tokens", "d", "pairs"), "i32"
                ),
            },
            constexprs={"INTERLEAVED": interleaved, "INVERSE": interleaved, **_block(*shape)},
        )
        for name, shape in shapes.items()
        for dtype, interleaved in (("bf16", False), ("fp32", True))
    ]


AOT_CASES = _aot_cases()
