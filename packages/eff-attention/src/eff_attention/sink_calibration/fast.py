"""Calibration of the host's output, without a map: o' = f o + (beta - f) e with e what the sinks contribute to o.

f = 1 + (1 - beta) M / (1 - M) is the factor of all other keys and M the weight of the sinks. Only the columns of the
sinks are computed, from the log-sum-exp that the search for sinks has left. Queries with M near 1 get their whole row.
"""

from __future__ import annotations

import torch
from eff_kernels.edit.attention import AttentionCall, rows
from torch import Tensor

from eff_attention.sink_calibration.functional import calibrate_attention

_SHORTEST = 64  # queries from which on it is worth it
_SHARE = 8  # sinks may be one key in so many
_MOST_POOR = 4  # queries that need whole rows may be one in so many
_ROWS = 128  # of these at a time


def why_not(call: AttentionCall) -> str:
    """What the layer has that the fast path does not know; empty if there is nothing."""
    names = [n for n in ("softcap", "sinks", "bias", "window") if getattr(call, n) is not None]
    names += [n for n in ("dropout", "edits", "wants_weights") if getattr(call, n)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v)):
        names.append("gradients")
    return ", ".join(names)


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
    group = call.num_heads // call.num_kv_heads
    shared = [h // group for h in heads]
    which = list(heads)
    with torch.autocast(call.q.device.type, enabled=False):
        q = call.q[:, which].to(call.dtype).to(dtype)
        k, v = (_gathered(t[:, shared].to(call.dtype).to(dtype), at) for t in (call.k, call.v))
        scores = q @ k.mT * call.scale  # [B, h, Sq, m]
        added = call.additive_mask()
        added = added.expand(at.shape[0], -1, call.num_queries, call.num_keys)
        added = added if added.shape[1] == 1 else added[:, which]
        added = added.expand(-1, len(heads), -1, -1).gather(-1, at[:, :, None].expand(-1, -1, call.num_queries, -1))
        weights = (scores + added - lse.to(dtype)[..., None]).exp()
        weights = torch.where(is_sink[:, :, None], weights, 0.0)
        mass = weights.sum(-1, keepdim=True)
        rest = 1.0 - mass
        # The factor multiplies what the host has rounded off, and 1 - M has lost digits where M is near 1.
        poor = (rest < (0.25 if out.element_size() < 4 else 0.01))[..., 0].any(0).any(0).nonzero()[:, 0].tolist()
        if len(poor) * _MOST_POOR > call.num_queries:
            return None
        rest = rest.clamp(min=1e-6)
        factor = 1.0 + (1.0 - beta) * mass / rest
        base = out[:, which].to(dtype)
        new = torch.where(mass == 0, base, factor * base + (beta - factor) * (weights @ v))
        full = torch.nn.functional.pad(sinks, (0, call.num_keys - sinks.shape[-1]))
        for start in range(0, len(poor), _ROWS):
            lines = poor[start : start + _ROWS]
            attn = calibrate_attention(rows(call, lines, heads), full, beta).to(dtype)
            new[:, :, lines] = attn @ call.v[:, shared].to(call.dtype).to(dtype)
    result = out.clone()
    result[:, which] = new.to(out.dtype)
    return result


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """Rows [B, h, m, D] of keys or values [B, h, S, D]."""
    return x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1]))
