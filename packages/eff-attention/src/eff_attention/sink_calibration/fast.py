"""Calibration of the host's output, without a map: o' = f o + (beta - f) e with e what the sinks contribute to o.

f = 1 + (1 - beta) M / (1 - M) is the factor of all other keys and M the weight of the sinks. Only the columns of the
sinks are computed, from the log-sum-exp that the search for sinks has left. Queries with M near 1 get their whole row.
"""

from __future__ import annotations

import torch
from eff_kernels.edit.attention import AttentionCall, rows
from torch import Tensor

from eff_attention.plain import is_plain
from eff_attention.sink_calibration.functional import calibrate_attention

_SHORTEST = 64  # queries from which on it is worth it
_SHARE = 8  # sinks may be one key in so many
_MOST_POOR = 4  # queries that need whole rows may be one in so many
_ROWS = 128  # of these at a time


def is_worth_it(call: AttentionCall, sinks: Tensor) -> bool:
    """Whether the call is long enough, with few enough sinks [B, h, n]."""
    return call.num_queries >= _SHORTEST and int(sinks.sum(-1).max()) * _SHARE <= sinks.shape[-1]


def calibrated(
    call: AttentionCall, out: Tensor, lse: Tensor, sinks: Tensor, heads: tuple[int, ...], beta: float
) -> Tensor | None:
    """The output with some heads calibrated, or None if many queries have next to nothing but sinks.

    Args:
        call: The call.
        out: The host's output [B, H, Sq, Dv].
        lse: Log-sum-exp [B, h, Sq] of these heads.
        sinks: bool [B, h, n], n up to the number of keys.
        heads: The heads.
        beta: Factor of the sinks.

    Returns:
        [B, H, Sq, Dv] in the dtype of ``out``; the other heads are the same numbers.
    """
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    count = int(sinks.sum(-1).max())
    at = sinks.int().topk(count, -1).indices  # [B, h, m]; rows with fewer sinks have other keys among them
    is_sink = sinks.gather(-1, at)
    # Queries before the first sink give it nothing.
    start = 0
    if is_plain(call):
        gap = call.num_keys - call.num_queries
        start = max(0, int(sinks.any(0).any(0).nonzero()[0, 0]) - gap)
    lines = range(start, call.num_queries)
    group = call.num_heads // call.num_kv_heads
    shared = [h // group for h in heads]
    which = slice(None) if len(heads) == call.num_heads else list(heads)
    with torch.autocast(call.q.device.type, enabled=False):
        q = call.q[:, which, start:].to(call.dtype).to(dtype)
        k, v = (_gathered(t, shared, at).to(call.dtype).to(dtype) for t in (call.k, call.v))
        weights = q @ k.mT * call.scale - lse.to(dtype)[:, :, start:, None]  # [B, h, q, m]
        if is_plain(call):
            place = torch.arange(call.num_keys - len(lines), call.num_keys, device=at.device)
            weights.masked_fill_((at[:, :, None] > place[:, None]) | ~is_sink[:, :, None], -torch.inf)
        else:
            added = call.additive_mask()
            added = added.expand(at.shape[0], -1, call.num_queries, call.num_keys)
            added = added if added.shape[1] == 1 else added[:, which]
            added = added.expand(-1, len(heads), -1, -1).gather(-1, at[:, :, None].expand(-1, -1, len(lines), -1))
            weights = torch.where(is_sink[:, :, None], weights + added, -torch.inf)
        weights.exp_()
        mass = weights.sum(-1, keepdim=True)
        rest = 1.0 - mass
        # The factor multiplies what the host has rounded off, and 1 - M has lost digits where M is near 1.
        near = (rest < (0.25 if out.element_size() < 4 else 0.01))[..., 0].any(0)  # [h, q]
        poor, of = near.any(0).nonzero()[:, 0].tolist(), near.any(1).nonzero()[:, 0].tolist()
        if len(poor) * _MOST_POOR > call.num_queries:
            return None
        factor = 1.0 + (1.0 - beta) * mass / rest.clamp(min=1e-6)
        # Where M is 0 the factor is 1 and the sinks add 0: the host's own number comes out.
        new = ((beta - factor) * weights) @ v
        new = new.addcmul_(out[:, which, start:].to(dtype), factor)
        full = torch.nn.functional.pad(sinks, (0, call.num_keys - sinks.shape[-1]))
        for first in range(0, len(poor), _ROWS):
            some = torch.tensor(poor[first : first + _ROWS], device=at.device)
            attn = rows(call, start + some, [heads[i] for i in of])
            attn = calibrate_attention(attn, full[:, of], beta).to(dtype)
            whole = attn @ call.v[:, [shared[i] for i in of]].to(call.dtype).to(dtype)
            # Other heads of these queries keep what the columns gave.
            new[:, torch.tensor(of, device=at.device)[:, None], some] = whole
    result = out.clone()
    result[:, which, start:] = new.to(out.dtype)
    return result


def _gathered(x: Tensor, shared: list[int], at: Tensor) -> Tensor:
    """Keys or values [B, KV, S, D] of query heads that share these of them, at places [B, h, m]."""
    batch = torch.arange(at.shape[0], device=at.device)[:, None, None]
    return x[batch, torch.tensor(shared, device=at.device)[:, None], at]
