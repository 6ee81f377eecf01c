"""Changed weights in plain PyTorch, in the open, the truth that every backend is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff_kernels.ops.attention_shift.args import MoveArgs, ScaleArgs
from eff_kernels.ops.attention_shift.common import copied


def scale_weights(*args: *ScaleArgs) -> Tensor:
    """Weights of some keys times beta, those of the others in proportion."""
    q, k, v, out, lse, scale, columns, beta, heads = args
    weights, values = _open(q, k, v, lse, scale, heads)
    of = columns[:, :, None]
    mass = weights.where(of, 0.0).sum(-1, keepdim=True)
    rest = weights.where(~of, 0.0).sum(-1, keepdim=True)
    select = (mass > 0) & (rest > torch.finfo(torch.float32).tiny)
    gain = 1 + (1 - beta) * mass / rest.where(select, 1.0)
    changed = torch.where(of, beta, gain) * weights @ values
    found = copied(out)
    found[:, list(heads)] = torch.where(select, changed.to(out.dtype), out[:, list(heads)])
    return found


def move_weights(*args: *MoveArgs) -> tuple[Tensor, Tensor]:
    """A share of the weights of givers and others goes to the receivers."""
    q, k, v, out, lse, scale, receivers, givers, others, asked, share, rho, least, by_sinks = args
    weights, values = _open(q, k, v, lse, scale, range(q.shape[1]))
    of_receivers, of_losers = receivers[:, None, None], (givers | others)[:, None, None]
    good = weights.where(of_receivers, 0.0).sum(-1)
    bad = weights.where(givers[:, None, None], 0.0).sum(-1)
    given = share * weights.where(of_losers, 0.0).sum(-1)
    mass, count = good + bad, (receivers | givers).sum(1)[:, None, None]
    looks = bad <= rho * (mass + 1e-6 * count) if by_sinks else good >= rho * mass
    select = asked[:, None] & looks & (mass >= least) & (good > 0)
    enough = select & (good > torch.finfo(torch.float32).tiny)
    gain = (given / good.where(enough, 1.0))[..., None]
    change = torch.where(of_receivers, gain, torch.where(of_losers, -share, 0.0)) * weights
    moved = (out.to(change.dtype) + change @ values).to(out.dtype)
    found = copied(out)
    found.copy_(torch.where(enough[..., None], moved, out))
    return found, torch.stack((select.sum(-1).to(given.dtype), given.where(select, 0.0).sum(-1)), -1).double()


def _open(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weights [B, h, Sq, S] of some heads, and the values that they are for."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, count = k.shape[2], q.shape[2]
    shared = [h * k.shape[1] // q.shape[1] for h in heads]
    scores = q[:, list(heads)].to(wide) @ k[:, shared].to(wide).mT * scale
    hidden = torch.ones(count, keys, dtype=torch.bool, device=q.device).triu(keys - count + 1)
    weights = (scores - lse[:, list(heads), :, None].to(wide)).exp().masked_fill(hidden, 0.0)
    return weights, v[:, shared].to(wide)
