"""Triton kernels of grouped_lora. Not yet run on a GPU: compiled and interpreted only.

No sorting and no atomics: a program takes a block of rows and an expert, and ends at once if no row of the block names
that expert, which is the rule where neighbours belong to one request. A few rows therefore read each factor once.

`_shrink_kernel` gives h[t, j] = first[e] x[t], `_expand_kernel` out[t] = y[t] + sum_j gate[t, j] second[e] h[t, j], and
`_outer_kernel` d[e] = sum of gate[t, j] h[t, j] z[t]^T. With the factors exchanged and transposed, which is a matter of
strides, the first two are the backward to x, and the third that to both factors.

M: rows. R: the rank, padded. K: inputs. N: outputs. P: places of a row, padded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import INTERPRET, AotCase
from eff_kernels.ops.grouped_lora.args import Args, BackwardArgs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_RANK = 128


@triton.jit
def _shrink_kernel(
    x_ptr, x_step, x_unit, f_ptr, f_expert, f_row, f_column, ids_ptr, h_ptr, rows, width, rank, places, chunk,
    IEEE: tl.constexpr, INTERP: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    expert = tl.program_id(1)
    place_P = tl.arange(0, P)
    mask_MP = (row_M < rows)[:, None] & (place_P < places)[None, :]
    ids_MP = tl.load(ids_ptr + row_M[:, None] * places + place_P[None, :], mask_MP, other=-1).to(tl.int32)
    hit_M = tl.max((ids_MP == expert).to(tl.int32), 1)
    if tl.max(hit_M, 0) > 0:
        rank_R = tl.arange(0, R)
        sums_MR = tl.zeros([BM, R], tl.float32)
        first = tl.program_id(2) * chunk
        last = tl.minimum(first + chunk, width)
        f_expert_ptr = f_ptr + expert.to(tl.int64) * f_expert
        for start in range(first, last, BK):
            column_K = start + tl.arange(0, BK)
            x_MK = tl.load(
                x_ptr + row_M[:, None] * x_step + column_K[None, :] * x_unit,
                (hit_M > 0)[:, None] & (column_K < last)[None, :], other=0.0,
            )  # fmt: skip
            f_KR = tl.load(
                f_expert_ptr + rank_R[None, :] * f_row + column_K[:, None] * f_column,
                (rank_R < rank)[None, :] & (column_K < last)[:, None], other=0.0,
            )  # fmt: skip
            if IEEE or INTERP:
                sums_MR = tl.dot(x_MK.to(tl.float32), f_KR.to(tl.float32), sums_MR, input_precision="ieee")
            else:
                sums_MR = tl.dot(x_MK, f_KR.to(x_MK.dtype), sums_MR)
        h_part_ptr = h_ptr + tl.program_id(2).to(tl.int64) * rows * places * rank
        for place in range(places):
            id_M = tl.load(ids_ptr + row_M * places + place, row_M < rows, other=-1).to(tl.int32)
            h_MR = h_part_ptr + ((row_M * places + place) * rank)[:, None] + rank_R[None, :]
            tl.store(h_MR, sums_MR, (id_M == expert)[:, None] & (rank_R < rank)[None, :])


@triton.jit
def _gated(
    h_ptr, ids_ptr, weight_ptr, scale_ptr, row_M, rank_R, rows, rank, places, expert,
    WEIGHTS: tl.constexpr, SCALE: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The sum of gate * h over those places of each row that name the expert, [BM, R]."""
    sums_MR = tl.zeros([BM, R], tl.float32)
    for place in range(places):
        at_M = row_M * places + place
        named_M = tl.load(ids_ptr + at_M, row_M < rows, other=-1).to(tl.int32) == expert
        h_MR = tl.load(
            h_ptr + (at_M * rank)[:, None] + rank_R[None, :],
            named_M[:, None] & (rank_R < rank)[None, :], other=0.0,
        )  # fmt: skip
        if WEIGHTS:
            h_MR *= tl.load(weight_ptr + at_M, named_M, other=0.0).to(tl.float32)[:, None]
        sums_MR += h_MR
    if SCALE:
        sums_MR *= tl.load(scale_ptr + expert).to(tl.float32)
    return sums_MR


@triton.jit
def _expand_kernel(
    h_ptr, f_ptr, f_expert, f_row, f_column, ids_ptr, weight_ptr, scale_ptr, y_ptr, y_step, y_unit, out_ptr,
    rows, width, rank, places, experts,
    WEIGHTS: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr, IEEE: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column_N = tl.program_id(1) * BN + tl.arange(0, BN)
    rank_R, place_P = tl.arange(0, R), tl.arange(0, P)
    mask_MN = (row_M < rows)[:, None] & (column_N < width)[None, :]
    mask_MP = (row_M < rows)[:, None] & (place_P < places)[None, :]
    ids_MP = tl.load(ids_ptr + row_M[:, None] * places + place_P[None, :], mask_MP, other=-1).to(tl.int32)
    sums_MN = tl.zeros([BM, BN], tl.float32)
    for expert in range(experts):
        hit_M = tl.max((ids_MP == expert).to(tl.int32), 1)
        if tl.max(hit_M, 0) > 0:
            h_MR = _gated(h_ptr, ids_ptr, weight_ptr, scale_ptr, row_M, rank_R, rows, rank, places, expert,
                          WEIGHTS, SCALE, R, BM)  # fmt: skip
            f_RN = tl.load(
                f_ptr + tl.cast(expert, tl.int64) * f_expert + rank_R[:, None] * f_column + column_N[None, :] * f_row,
                (rank_R < rank)[:, None] & (column_N < width)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            update_MN = tl.dot(h_MR, f_RN, input_precision="ieee" if IEEE else "tf32")
            sums_MN += tl.where((hit_M > 0)[:, None], update_MN, 0.0)
    if ADD:
        y_MN = tl.load(y_ptr + row_M[:, None] * y_step + column_N[None, :] * y_unit, mask_MN, other=0.0)
        named_M = tl.max(((ids_MP >= 0) & (ids_MP < experts)).to(tl.int32), 1)
        y_MN = y_MN.to(tl.float32)
        sums_MN = tl.where((named_M > 0)[:, None], y_MN + sums_MN, y_MN)
    tl.store(out_ptr + row_M[:, None] * width + column_N[None, :], sums_MN.to(out_ptr.dtype.element_ty), mask_MN)


@triton.jit
def _outer_kernel(
    h_ptr, z_ptr, z_step, z_unit, ids_ptr, weight_ptr, scale_ptr, d_ptr, d_expert, d_row, d_column,
    rows, width, rank, places,
    WEIGHTS: tl.constexpr, SCALE: tl.constexpr, IEEE: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    column_N = tl.program_id(1) * BN + tl.arange(0, BN)
    rank_R, place_P = tl.arange(0, R), tl.arange(0, P)
    sums_RN = tl.zeros([R, BN], tl.float32)
    for start in range(0, rows, BM):
        row_M = (start + tl.arange(0, BM)).to(tl.int64)
        mask_MP = (row_M < rows)[:, None] & (place_P < places)[None, :]
        ids_MP = tl.load(ids_ptr + row_M[:, None] * places + place_P[None, :], mask_MP, other=-1).to(tl.int32)
        hit_M = tl.max((ids_MP == expert).to(tl.int32), 1)
        if tl.max(hit_M, 0) > 0:
            h_MR = _gated(h_ptr, ids_ptr, weight_ptr, scale_ptr, row_M, rank_R, rows, rank, places, expert,
                          WEIGHTS, SCALE, R, BM)  # fmt: skip
            z_MN = tl.load(
                z_ptr + row_M[:, None] * z_step + column_N[None, :] * z_unit,
                (hit_M > 0)[:, None] & (column_N < width)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            sums_RN = tl.dot(tl.trans(h_MR), z_MN, sums_RN, input_precision="ieee" if IEEE else "tf32")
    d_RN = d_ptr + expert.to(tl.int64) * d_expert + rank_R[:, None] * d_row + column_N[None, :] * d_column
    tl.store(d_RN, sums_RN.to(d_ptr.dtype.element_ty), (rank_R < rank)[:, None] & (column_N < width)[None, :])


def reject(*args: *Args) -> str | None:
    x, a, *_, weights, scale, y = args
    for name, tensor in (("x", x), ("a", a), ("weights", weights), ("scale", scale), ("y", y)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"takes float32, bfloat16 and float16, got {name} of {tensor.dtype}"
    if a.shape[1] > _LARGEST_RANK:
        return f"takes ranks up to {_LARGEST_RANK}, got {a.shape[1]}"
    if a.shape[0] > 65535:
        return f"takes up to 65535 experts, got {a.shape[0]}"
    return None


def reject_backward(*args: *BackwardArgs) -> str | None:
    grad, x, a, b, ids, weights, scale, *_ = args
    return reject(x, a, b, ids, weights, scale, grad)


def run(*args: *Args) -> Tensor:
    x, a, b, ids, weights, scale, y = args
    out = x.new_empty((x.shape[0], b.shape[1]), dtype=x.dtype if y is None else y.dtype)
    if out.numel() == 0:
        return out
    if ids.shape[1] == 0 or 0 in a.shape:
        return out.zero_() if y is None else out.copy_(y)
    _expand(_shrink(x, a, a.shape[1], a.stride(), ids), b, b.stride(), ids.contiguous(), weights, scale, y, out)
    return out


def run_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, a, b, ids, weights, scale, experts = args
    dx = x.new_empty(x.shape)
    da, db = (t.new_empty(t.shape if experts else (0, *t.shape[1:])) for t in (a, b))
    dweights = (x if weights is None else weights).new_empty(ids.shape)
    if ids.numel() == 0 or 0 in a.shape or 0 in b.shape:
        return dx.zero_(), da.zero_(), db.zero_(), dweights.zero_()
    ids = ids.contiguous()
    across_a, across_b = (a.stride(0), a.stride(2), a.stride(1)), (b.stride(0), b.stride(2), b.stride(1))
    low, pull = _shrink(x, a, a.shape[1], a.stride(), ids), _shrink(grad, b, b.shape[2], across_b, ids)
    _expand(pull, a, across_a, ids, weights, scale, None, dx)
    named = (ids >= 0) & (ids < a.shape[0])
    dots = (low * pull).sum(-1)
    if scale is not None:
        dots = dots * scale.float()[ids.clamp(0, a.shape[0] - 1)]
    dweights.copy_(torch.where(named, dots, 0.0))
    if experts:
        _outer(pull, x, ids, weights, scale, da, da.stride())
        _outer(low, grad, ids, weights, scale, db, (db.stride(0), db.stride(2), db.stride(1)))
    return dx, da, db, dweights


def _shrink(x: Tensor, factor: Tensor, rank: int, strides: tuple[int, ...], ids: Tensor) -> Tensor:
    """The low-rank sums of each place, float32 [T, k, R]; ``strides`` are those along experts, ranks and inputs."""
    (rows, width), places, ids = x.shape, ids.shape[1], ids.contiguous()
    block = _block(rank, places, _wide(x, factor))
    blocks = triton.cdiv(rows, block["BM"])
    # Few rows make few programs: these share the inputs, and their sums are added up.
    split = 1 if INTERPRET else max(1, min(8, 64 // blocks, width // 512))
    chunk = triton.cdiv(triton.cdiv(width, split), 128) * 128
    split = triton.cdiv(width, chunk)
    h = x.new_zeros((split, rows, places, rank), dtype=torch.float32)
    _shrink_kernel[(blocks, factor.shape[0], split)](
        x, x.stride(0), x.stride(1), factor, *strides, ids, h, rows, width, rank, places, chunk,
        IEEE=_wide(x, factor), INTERP=INTERPRET, BK=_inputs(block["R"], _wide(x, factor)), **block,
    )  # fmt: skip
    return h[0] if split == 1 else h.sum(0)


def _expand(
    h: Tensor,
    factor: Tensor,
    strides: tuple[int, ...],
    ids: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    y: Tensor | None,
    out: Tensor,
) -> None:
    """Out = y + the gated updates; ``strides`` are those along experts, outputs and ranks."""
    (rows, width), (_, places, rank) = out.shape, h.shape
    block = _block(rank, places, _wide(out, factor))
    base = out if y is None else y
    columns = _outputs(block["R"])
    _expand_kernel[(triton.cdiv(rows, block["BM"]), triton.cdiv(width, columns))](
        h, factor, *strides, ids, h if weights is None else weights.contiguous(),
        h if scale is None else scale.contiguous(),
        base, base.stride(0), base.stride(1), out, rows, width, rank, places, factor.shape[0],
        WEIGHTS=weights is not None, SCALE=scale is not None, ADD=y is not None, IEEE=_wide(out, factor), BN=columns,
        **block,
    )  # fmt: skip


def _outer(
    h: Tensor,
    z: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    strides: tuple[int, ...],
) -> None:
    """out[e] = sum of the gated h[t, j] z[t]^T; ``strides`` of ``out`` are those along experts, ranks and columns."""
    (rows, width), (_, places, rank) = z.shape, h.shape
    block = _block(rank, places, _wide(z, out))
    columns = _outputs(block["R"])
    _outer_kernel[(out.shape[0], triton.cdiv(width, columns))](
        h, z, z.stride(0), z.stride(1), ids, h if weights is None else weights.contiguous(),
        h if scale is None else scale.contiguous(), out, *strides, rows, width, rank, places,
        WEIGHTS=weights is not None, SCALE=scale is not None, IEEE=_wide(z, out), BN=columns, **block,
    )  # fmt: skip


def _wide(x: Tensor, factor: Tensor) -> bool:
    """Whether the products are to be in full float32."""
    return x.dtype is torch.float32 or factor.dtype is torch.float32


def _block(rank: int, places: int, wide: bool) -> dict[str, Any]:
    """Rows are few in decoding, and neighbours of a prompt mostly name other experts: small blocks skip more."""
    padded = max(16, triton.next_power_of_2(rank))
    return {"P": triton.next_power_of_2(places), "R": padded, "BM": 16, "num_warps": 4 if wide or padded <= 64 else 8}


def _inputs(padded: int, wide: bool) -> int:
    """Inputs of a step, so that both operands fit into registers."""
    return min(64 if wide else 128, 4096 // padded)


def _outputs(padded: int) -> int:
    """Outputs of a program, likewise."""
    return min(64, 2048 // padded)


def _aot_cases() -> list[AotCase]:
    sizes = ("rows", "width", "rank", "places")
    strides = ("f_expert", "f_row", "f_column")
    cases = []
    for dtype, rank, places in (("bf16", 16, 3), ("fp16", 128, 1), ("fp32", 128, 3)):
        wide = dtype == "fp32"
        block = _block(rank, places, wide)
        options = {"num_warps": block.pop("num_warps")}
        columns = _outputs(block["R"])
        label, mma = f"{dtype}-r{rank}-k{places}", None if wide else "any"
        gates = {"ids_ptr": "*i64", "weight_ptr": "*fp32", "scale_ptr": "*fp32"}
        flags = {"WEIGHTS": True, "SCALE": True, "IEEE": wide}
        common: dict[str, Any] = {"options": options, "mma": mma, "unaligned": ("rows", "places", *strides)}
        for order, one in (("", "f_column"), ("-across", "f_row")):
            ints = dict.fromkeys([s for s in strides if s != one], "i32")
            cases.append(
                AotCase(
                    name=f"shrink-{label}{order}",
                    kernel=_shrink_kernel,
                    signature={
                        "x_ptr": f"*{dtype}", "f_ptr": f"*{dtype}", "ids_ptr": "*i64", "h_ptr": "*fp32",
                        **dict.fromkeys((*sizes, "x_step", "chunk"), "i32"), **ints,
                    },
                    constexprs={
                        "x_unit": 1, one: 1, "IEEE": wide, "INTERP": False, "BK": _inputs(block["R"], wide), **block,
                    },
                    **common,
                )
            )  # fmt: skip
            cases.append(
                AotCase(
                    name=f"expand-{label}{order}",
                    kernel=_expand_kernel,
                    signature={
                        "h_ptr": "*fp32", "f_ptr": f"*{dtype}", **gates, "y_ptr": f"*{dtype}", "out_ptr": f"*{dtype}",
                        **dict.fromkeys((*sizes, "experts", "y_step"), "i32"), **ints,
                    },
                    constexprs={"y_unit": 1, one: 1, "ADD": True, "BN": columns, **flags, **block},
                    **common,
                )
            )  # fmt: skip
        cases.append(
            AotCase(
                name=f"outer-{label}",
                kernel=_outer_kernel,
                signature={
                    "h_ptr": "*fp32", "z_ptr": f"*{dtype}", **gates, "d_ptr": f"*{dtype}",
                    **dict.fromkeys((*sizes, "z_step", "d_expert", "d_row"), "i32"),
                },
                constexprs={"z_unit": 1, "d_column": 1, "BN": columns, **flags, **block},
                **{**common, "unaligned": ("rows", "places")},
            )
        )  # fmt: skip
    return cases


AOT_CASES = _aot_cases()
