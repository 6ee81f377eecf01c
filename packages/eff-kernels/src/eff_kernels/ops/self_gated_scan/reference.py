"""self_gated_scan in plain PyTorch, by the matrix of all weights."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.self_gated_scan.args import Args, BackwardArgs
from eff_kernels.ops.self_gated_scan.common import empty_state


def self_gated_scan(*args: *Args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output; highest score so far and sum of the exponentials below it, both [B, H, T]; state or empty tensor."""
    score, v, state, return_state = args
    wide = torch.promote_types(v.dtype, torch.float32)
    s, values = score.to(wide), v.to(wide).repeat_interleave(score.size(1) // v.size(1), 1)
    tops = s.detach().cummax(-1).values
    if state is not None:
        mean, total, top = state.to(wide).split([v.size(-1), 1, 1], -1)
        tops = torch.maximum(tops, top)
    weight = _weights(s, tops)
    totals, sums = weight.sum(-1), weight @ values
    if state is not None:
        past = total * (top - _finite(tops)).exp()
        totals, sums = totals + past, sums + past.unsqueeze(-1) * mean.unsqueeze(-2)
    out = sums / _not_zero(totals).unsqueeze(-1)
    final = state_after(out, totals, tops, state, return_state)
    return out.to(v.dtype), tops, totals.detach(), final


def self_gated_scan_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    """Gradients to score and v: with the weights p, p^T grad to v, and sum_i p_ij grad_i . (v_j - out_i) to score."""
    grad, score, v, out, tops, totals, *_ = args
    g, values = grad.to(totals.dtype), v.to(totals.dtype).repeat_interleave(score.size(1) // v.size(1), 1)
    weight = _weights(score.to(totals.dtype), tops) / _not_zero(totals).unsqueeze(-1)
    along = (g * out).sum(-1, keepdim=True)
    dscore = (weight * (g @ values.mT - along)).sum(-2)
    dv = (weight.mT @ g).unflatten(1, (v.size(1), -1)).sum(2) if v.size(1) != score.size(1) else weight.mT @ g
    return dscore.to(score.dtype), dv.to(v.dtype)


def _weights(s: Tensor, tops: Tensor) -> Tensor:
    """exp(s_j - tops_i) for j <= i, and zeros."""
    seen = torch.ones(s.size(-1), s.size(-1), dtype=torch.bool, device=s.device).tril()
    return (torch.where(seen, s.unsqueeze(-2), -torch.inf) - _finite(tops).unsqueeze(-1)).exp()


def _finite(tops: Tensor) -> Tensor:
    """0 where no key was seen yet."""
    return torch.where(tops == -torch.inf, 0, tops)


def _not_zero(totals: Tensor) -> Tensor:
    return torch.where(totals == 0, 1, totals)


def state_after(out: Tensor, totals: Tensor, tops: Tensor, state: Tensor | None, wanted: bool) -> Tensor:
    """The state after the last token, or an empty tensor; it carries no gradient."""
    if not wanted:
        return out.new_empty(0)
    if out.size(2):
        last = [out[:, :, -1], totals[..., -1:], tops[..., -1:]]
        return torch.cat(last, -1).detach()
    return empty_state(tops, out) if state is None else state.to(out.dtype, copy=True)
