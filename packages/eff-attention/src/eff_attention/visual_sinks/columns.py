"""The weights of few keys, and the host's output changed by them: what VAR moves lies in pictures and sinks alone.

The other weights of a row stay what they are, so that o' = o + (A' - A) V over these keys, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from eff_kernels import attention_columns
from eff_kernels.edit.attention import AttentionCall
from torch import Tensor

from eff_attention.plain import alike, is_plain

_SHORTEST = 64  # queries from which on it is worth it
_SHARE = 3  # the keys may be one in so many


def is_worth_it(call: AttentionCall, keys: Tensor) -> bool:
    """Whether a call is plain and long enough, and the keys, bool [B, Sk], few enough."""
    return call.num_queries >= _SHORTEST and is_plain(call) and int(keys.any(0).sum()) * _SHARE <= call.num_keys


@dataclass(frozen=True)
class Columns:
    """Weights that queries of a plain call give to some keys.

    Attributes:
        at: The keys, int64 [c].
        first: The first of the queries; all later ones are taken.
        weights: [B, H, q, c], float32, or float64 for float64 calls.
    """

    at: Tensor
    first: int
    weights: Tensor

    @classmethod
    def of(cls, call: AttentionCall, keys: Tensor, first: int) -> Columns:
        """Those of the keys that one of the sequences has in ``keys``, bool [B, Sk]."""
        at = keys.any(0).nonzero()[:, 0]
        query, key = alike(call, call.q), alike(call, call.k)
        found = attention_columns(query, key, scale=call.scale)
        wide = found.lse.dtype
        place = torch.arange(call.num_keys - call.num_queries + first, call.num_keys, device=at.device)
        with torch.autocast(at.device.type, enabled=False):
            few = key[:, :, at].to(wide)
            rows = query[:, :, first:].to(wide).reshape(few.shape[0], few.shape[1], -1, few.shape[3])
            scores = (rows @ few.mT * call.scale).reshape(*query.shape[:2], -1, len(at))
        scores -= found.lse[:, :, first:, None]
        return cls(at, first, scores.masked_fill_(at > place[:, None], -torch.inf).exp_())

    def changed(self, call: AttentionCall, out: Tensor, weights: Tensor) -> Tensor:
        """The host's output [B, H, Sq, Dv] with these weights in place of those that were."""
        value = alike(call, call.v)[:, :, self.at].to(weights.dtype)
        with torch.autocast(out.device.type, enabled=False):
            rows = (weights - self.weights).reshape(value.shape[0], value.shape[1], -1, value.shape[2])
            more = (rows @ value).reshape(*weights.shape[:3], -1)
        result = out.clone()
        result[:, :, self.first :] = (more + out[:, :, self.first :]).to(out.dtype)
        return result
