"""self_gated_scan: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.self_gated_scan import cpu, reference
from eff_kernels.ops.self_gated_scan.args import Args, check
from eff_kernels.ops.self_gated_scan.autograd import backward, setup_context


class SelfGatedScanOutput(NamedTuple):
    """What `self_gated_scan` returns.

    Attributes:
        output: [B, H, T, Dv] of the dtype of v.
        state: [B, H, Dv + 2] in float32 if it was asked for, else None: the running mean, the sum of the exponentials
            of the scores below the highest, and the highest score.
    """

    output: Tensor
    state: Tensor | None


def _allocate(*args: *Args) -> tuple[Tensor, ...]:
    score, v, _, keep = args
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = (score.size(0), score.size(1), v.size(-1) + 2) if keep else (0,)
    tops, totals, final = (score.new_empty(s, dtype=wide) for s in (score.shape, score.shape, shape))
    return v.new_empty(*score.shape, v.size(-1)), tops, totals, final


OP = Op(
    "self_gated_scan",
    schema_of(Args, "(Tensor, Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", cpu.self_gated_scan, cpu.reject),
        triton_backend("eff_kernels.ops.self_gated_scan.triton"),
        Backend("reference", reference.self_gated_scan),
    ],
    fake=_allocate,
    setup_context=setup_context,
    backward=backward,
)


def self_gated_scan(
    score: Tensor, v: Tensor, *, state: Tensor | None = None, return_state: bool = False, backend: str = "auto"
) -> SelfGatedScanOutput:
    """Mean of all values up to each token, weighted by the exponential of a score that belongs to the value.

    output[i] = sum_{j <= i} exp(score[j]) v[j] / sum_{j <= i} exp(score[j]), in float32, by a running mean: time is
    linear in the tokens, and no exponential is taken of a positive number, so that scores may be of any size.

    Args:
        score: [B, H, T] of any float dtype; -inf hides a key. A token with no key to see gives zeros.
        v: [B, Hkv, T, Dv]; H must be a multiple of Hkv, and head h reads the values of h // (H / Hkv).
        state: That of an earlier call, over the tokens before these. It is not changed, and carries no gradient.
        return_state: Whether to return the state after these tokens.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Raises:
        ValueError: shapes do not fit, or the state requires a gradient.
        TypeError: a dtype is not as stated.
        BackendError: the named backend cannot run this call; the message says why.
    """
    check(score, v, state)
    out, _, _, final = OP(score, v, state, return_state, backend=backend)
    return SelfGatedScanOutput(out, final if return_state else None)
