"""self_gated_scan in compiled code: one pass over the tokens of each head, with a running mean."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES, threads_for
from eff_kernels.ops.self_gated_scan.args import Args, BackwardArgs
from eff_kernels.ops.self_gated_scan.common import empty_state

_ARGS = struct.Struct("5q3q9P3q")  # the fields of scan_args in self_gated_scan.c
_kernel = native.loader_by_name(_ARGS, may_fail=False)


def reject(score: Tensor, v: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(v, score.dtype)


def reject_backward(grad: Tensor, score: Tensor, v: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(v, score.dtype)


def self_gated_scan(*args: *Args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    score, v, state, return_state = args
    out = v.new_empty(*score.shape, v.size(-1))
    tops, totals = (torch.empty(score.shape, dtype=torch.float32) for _ in range(2))
    running = empty_state(score, v) if state is None else state.to(torch.float32, copy=True).contiguous()
    _call("eff_self_gated_scan", score, v, out, tops, totals, running)
    return out, tops, totals, running if return_state else running.new_empty(0)


def self_gated_scan_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    """As the reference."""
    grad, score, v, out, tops, totals, *_ = args
    dscore = torch.empty(score.shape, dtype=torch.float32)
    dv = torch.empty(out.shape, dtype=torch.float32)  # of each query head
    scratch = torch.empty(*score.shape[:2], v.size(-1), dtype=torch.float32)
    grad = grad.to(v.dtype).contiguous()
    _call("eff_self_gated_scan_backward", score, v, out, tops, totals, scratch, grad, dscore, dv)
    if v.size(1) != score.size(1):
        dv = dv.unflatten(1, (v.size(1), -1)).sum(2)
    return dscore.to(score.dtype), dv.to(v.dtype)


def _call(
    name: str,
    score: Tensor,
    v: Tensor,
    out: Tensor,
    tops: Tensor,
    totals: Tensor,
    running: Tensor,
    grad: Tensor | None = None,
    dscore: Tensor | None = None,
    dv: Tensor | None = None,
) -> None:
    score = score.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    more = [0 if t is None else t.data_ptr() for t in (grad, dscore, dv)]
    _kernel(name)(_ARGS.pack(
        score.size(0), score.size(1), v.size(1), score.size(2), v.size(3), *v.stride()[:3],
        score.data_ptr(), v.data_ptr(), out.data_ptr(), tops.data_ptr(), totals.data_ptr(), running.data_ptr(), *more,
        DTYPE_CODES[score.dtype], DTYPE_CODES[v.dtype], threads_for(out.numel()),
    ))  # fmt: skip
