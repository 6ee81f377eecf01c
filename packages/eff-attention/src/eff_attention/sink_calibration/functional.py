"""The formulas of ACT on a map of weights: which columns are sinks, and how their weight is given back.

Unveiling and Harnessing Hidden Attention Sinks (Yu and others, ICML 2024, arXiv 2406.15765).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from eff_kernels.edit.attention import head_indices
from torch import Tensor

from eff_attention.sink_calibration.config import Spare, Threshold, check_beta, check_threshold


def find_attention_sinks(
    attn: Tensor,
    threshold: Threshold = ("absolute", 0.1),
    *,
    spare: Spare = "first_token",
    attention_mask: Tensor | None = None,
    min_rows: int = 1,
) -> Tensor:
    """Columns of a causal map that get much weight: the sinks that ACT treats, without the first token.

    a_j is the mean of column j over the rows that can see it; j is a sink if a_j is above the threshold.

    Args:
        attn: Weights after the softmax [..., q, n], q <= n: the queries are the last q of n tokens.
        threshold: See `ACTConfig`.
        spare: See `ACTConfig`.
        attention_mask: 0 or False at padding [B, n], for ``attn`` [B, ..., q, n]: such rows and columns do not count.
        min_rows: See `ACTConfig`.

    Returns:
        bool [..., n].

    Raises:
        ValueError: shapes do not fit, or a limit is out of range.
    """
    check_threshold(threshold)
    if attn.dim() < 2 or attn.shape[-2] > attn.shape[-1]:
        raise ValueError(f"attn must be [..., q, n] with q <= n, got {list(attn.shape)}")
    if min_rows < 1:
        raise ValueError(f"min_rows={min_rows}; use at least 1")
    count, keys = attn.shape[-2:]
    real = torch.ones(keys, dtype=torch.bool, device=attn.device)
    if attention_mask is not None:
        if attn.dim() < 3 or attention_mask.shape != (attn.shape[0], keys):
            raise ValueError(f"attention_mask must be [B, {keys}] for attn [B, ...], got {list(attention_mask.shape)}")
        real = attention_mask.to(attn.device).bool().reshape(-1, *[1] * (attn.dim() - 3), keys)
    rows = real[..., keys - count :]
    place = torch.arange(keys, device=attn.device)
    seen = (place[keys - count :, None] >= place) & rows[..., None]
    sums = torch.where(seen, attn.detach().float(), 0.0).sum(-2)
    return sinks_of_sums(sums, seen.sum(-2), real, threshold, spare=spare, min_rows=min_rows)


def sinks_of_sums(
    sums: Tensor, rows: Tensor, real: Tensor, threshold: Threshold, *, spare: Spare, min_rows: int
) -> Tensor:
    """Sinks from the sums of columns.

    Args:
        sums: Weight that each key got, float32 [..., n].
        rows: Queries that could see it, broadcasts to ``sums``.
        real: Which keys are tokens and no padding, bool, broadcasts to ``sums``.
        threshold: See `ACTConfig`.
        spare: See `ACTConfig`.
        min_rows: See `ACTConfig`.

    Returns:
        bool [..., n].
    """
    return Limits.of(rows, real, threshold, spare=spare, min_rows=min_rows).sinks(sums)


class Limits(NamedTuple):
    """What sums of columns are held against, the same for all heads and layers of a pass.

    Attributes:
        rows: Queries that could see each key, at least 1.
        bound: Mean weight above which a key is a sink.
        may_be: Keys that may be sinks, bool.
        spare: See `ACTConfig`.
    """

    rows: Tensor
    bound: Tensor | float
    may_be: Tensor
    spare: Spare

    @classmethod
    def of(cls, rows: Tensor, real: Tensor, threshold: Threshold, *, spare: Spare, min_rows: int) -> Limits:
        """Limits from what `sinks_of_sums` takes."""
        kind, limit = threshold
        bound = limit / real.sum(-1, keepdim=True).clamp(min=1) if kind == "relative" else limit
        may_be = real & (rows >= min_rows)
        if spare == "first_token":
            may_be = may_be & (real.cumsum(-1) != 1)
        return cls(rows.clamp(min=1), bound, may_be, spare)

    def sinks(self, sums: Tensor) -> Tensor:
        """The sinks, bool like ``sums``."""
        high = (sums / self.rows > self.bound) & self.may_be
        # The first token, if it is a sink, is the first sink; if it is none there is nothing to spare it from.
        return high & (high.cumsum(-1) > 1) if self.spare == "first_sink" else high


def calibrate_attention(
    attn: Tensor, sinks: Tensor, beta: float = 0.4, heads: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Scale sinks by beta and give what they lose to the other keys of the row, in proportion to their weight.

    A'_ij = beta A_ij for sinks and A_ij (1 + m_i / R_i) for others, with m_i = (1 - beta) sum_S A_ij and R_i the sum
    over the others. The sum of a row stays what it is. A row whose others have no weight is left alone.

    Args:
        attn: Weights after the softmax [..., q, n]; differentiable.
        sinks: bool [..., n], broadcasts to the map without its queries; a constant.
        beta: 0 to 1.
        heads: For maps [..., H, q, n] the heads to change, as indices or mask [H]; None for all.

    Returns:
        The calibrated map in the dtype of ``attn``; computed in float32 at least.

    Raises:
        ValueError: beta is out of range, shapes do not fit, or a head does not exist.
    """
    check_beta(beta)
    if attn.dim() < 2 or sinks.shape[-1:] != attn.shape[-1:]:
        raise ValueError(f"sinks must be [..., n] for attn [..., q, n], got {list(sinks.shape)}, {list(attn.shape)}")
    if sinks.dtype != torch.bool:
        raise ValueError(f"sinks must be bool, got {sinks.dtype}")
    at = sinks[..., None, :].expand(torch.broadcast_shapes(sinks[..., None, :].shape, attn.shape))
    if heads is not None:
        if attn.dim() < 3:
            raise ValueError(f"heads are for maps [..., H, q, n], got {list(attn.shape)}")
        chosen = torch.zeros(attn.shape[-3], dtype=torch.bool, device=attn.device)
        chosen[list(head_indices(heads, attn.shape[-3]))] = True
        at = at & chosen[:, None, None]
    weights = attn if attn.dtype == torch.float64 else attn.float()
    of_sinks = torch.where(at, weights, 0.0)
    mass, rest = of_sinks.sum(-1, keepdim=True), torch.where(at, 0.0, weights).sum(-1, keepdim=True)
    enough = rest > torch.finfo(rest.dtype).tiny  # by less than this the share would leave the range
    gain = 1.0 + (1.0 - beta) * mass / rest.where(enough, 1.0)
    changed = torch.where(at, beta * weights, gain * weights)
    return torch.where(enough, changed, weights).to(attn.dtype)
