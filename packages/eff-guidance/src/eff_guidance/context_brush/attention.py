"""Shifted attention outputs and gains of heads, from fused attention over groups of keys.

With lse_X the log-sum-exp of a query's logits over keys X, the part of its output that comes from X is
``exp(lse_X - lse_all) * softmax attention over X alone``. No map of weights is ever held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Index = slice | Tensor
_BLOCK = 2**24  # entries of a block of logits in the open: 64 MiB


class Shifted(NamedTuple):
    """Outputs with shares added.

    Attributes:
        out: [B, H, N, d].
        masses: Weight that each query row gives to each source, and to "rest", all other keys; float32 (float64 for
            float64 input) [B, H, n].
    """

    out: Tensor
    masses: dict[str, Tensor]


class Portion(NamedTuple):
    """What rows read from some keys: their ``mass`` [B, H, n], and ``out`` [B, H, n, d] of attention to them alone."""

    mass: Tensor
    out: Tensor


class PartOutput(NamedTuple):
    """Attention over some keys: ``out`` [B, H, n, d] and ``lse`` of the logits [B, H, n], float32 or float64."""

    out: Tensor
    lse: Tensor


def shift_attention_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query: Index,
    sources: Mapping[str, tuple[Index, float]],
    scale: float | None = None,
    out: Tensor | None = None,
) -> Shifted:
    """Add to the output of some rows a share of what they read from some keys (section "latent feature shifting").

    out[query] += sum over sources of weight * A[query, keys] v[keys], where A are the weights over all keys, not
    normalised again; other rows stay bit-identical.

    Args:
        q: Queries [B, H, N, d].
        k: Keys [B, H, S, d].
        v: Values [B, H, S, d].
        query: Rows to shift, a slice or int64 [n].
        sources: For each name its keys, a slice or int64 [m], and its weight. Keys of two sources must not overlap.
        scale: Factor of the logits; 1 / sqrt(d) by default.
        out: What attention gave already, [B, H, N, d].

    Raises:
        ValueError: a source is called "rest", or two overlap.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = F.scaled_dot_product_attention(q, k, v, scale=scale) if out is None else out
    groups = {name: on(where, k) for name, (where, _) in sources.items()}
    groups["rest"] = rest_of(k, sources)
    query = on(query, q)
    parts = split_attention(q[:, :, query], k, v, groups, scale)
    shares = [(weight, *parts[name]) for name, (_, weight) in sources.items() if weight]
    return Shifted(add_shares(out, query, shares), {name: part.mass for name, part in parts.items()})


def split_attention(
    rows: Tensor, k: Tensor, v: Tensor, groups: Mapping[str, Index], scale: float
) -> dict[str, Portion]:
    """What rows [B, H, n, d] read from each group of keys; the groups together must be all keys, each once."""
    found = {name: attend_with_lse(rows, k[:, :, at], v[:, :, at], scale) for name, at in groups.items() if _any(at, k)}
    whole = torch.stack([part.lse for part in found.values()]).logsumexp(0)
    none = Portion(torch.zeros_like(whole), torch.zeros_like(rows))
    made = {name: Portion((part.lse - whole).exp(), part.out) for name, part in found.items()}
    return {name: made.get(name, none) for name in groups}


def add_shares(out: Tensor, query: Index, shares: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """``out`` with the sum of ``weight * mass * part`` added to its query rows, in a new tensor.

    Args:
        out: [B, H, N, d].
        query: The rows.
        shares: A number, a mass [B, H, n] and an output over some keys [B, H, n, d] each.
    """
    if not shares:
        return out
    more = sum(weight * mass[..., None] * part.to(mass.dtype) for weight, mass, part in shares)
    made = out.clone()
    made[:, :, query] = (out[:, :, query].to(mass_dtype(out)) + more).to(out.dtype)
    return made


def head_gains_from_mass(mass: Tensor, gain: float) -> Tensor:
    """Gains from 1 to 1 + ``gain`` of a sample's heads by the weight that they give to the text.

    1 + gain * (s - min s) / (max s - min s) over the heads; all 1 if they do not differ.

    Args:
        mass: s, [B, H].
        gain: From 0 on.

    Returns:
        [B, H], float32 (float64 for float64).
    """
    mass = mass.to(mass_dtype(mass))
    low, high = mass.amin(-1, keepdim=True), mass.amax(-1, keepdim=True)
    span = high - low
    share = torch.where(span > 0, (mass - low) / torch.where(span > 0, span, 1.0), 0.0)
    return 1 + gain * share.clamp(0, 1)


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> PartOutput:
    """Attention [B, H, n, d] over keys [B, H, m, d] with the log-sum-exp of each row's logits.

    One call of PyTorch's flash or memory-efficient kernel where there is one that gives the log-sum-exp, else in
    blocks of rows. Gradients flow through both results.
    """
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if not graph and q.shape[-1] == v.shape[-1]:
        ops = torch.ops.aten
        if q.device.type == "cpu":
            return PartOutput(*ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[:2])
        half = q.dtype in (torch.float16, torch.bfloat16)
        if q.device.type == "cuda" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
            return PartOutput(*ops._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2])
        if q.device.type == "cuda" and q.dtype == torch.float32 and q.shape[-1] % 4 == 0:
            made = ops._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
            return PartOutput(made[0], made[1][:, :, : q.shape[2]])  # its rows are padded to whole tiles
    outs, sums = [], []
    step = max(1, _BLOCK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    key, value = (t.to(mass_dtype(q)) for t in (k, v))
    for rows in q.split(step, 2):
        logits = rows.to(key.dtype) @ key.mT * scale
        outs.append((logits.softmax(-1) @ value).to(q.dtype))
        sums.append(logits.logsumexp(-1))
    return PartOutput(torch.cat(outs, 2), torch.cat(sums, 2))


def rest_of(k: Tensor, sources: Mapping[str, tuple[Index, float]]) -> Index:
    """Keys that are in no source.

    Raises:
        ValueError: a source is called "rest", or two overlap.
    """
    if "rest" in sources:
        raise ValueError("'rest' is the name of all other keys; give the source another one")
    taken = torch.zeros(k.shape[2], dtype=torch.int64)
    for where, _ in sources.values():
        taken[where.cpu() if isinstance(where, Tensor) else where] += 1
    if bool((taken > 1).any()):
        raise ValueError(f"sources {list(sources)} share {int((taken > 1).sum())} keys; wanted none in two of them")
    return on((taken == 0).nonzero()[:, 0], k)


def on(index: Index, like: Tensor) -> Index:
    """An index on the device of a tensor; a run of places becomes a slice, which makes no copy."""
    if isinstance(index, slice) or not len(index):
        return index
    if int(index[-1]) - int(index[0]) + 1 == len(index) and bool((index.diff() == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index.to(like.device)


def mass_dtype(x: Tensor) -> torch.dtype:
    """Masses of thousands of rows lose their differences in half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _any(index: Index, k: Tensor) -> bool:
    return len(range(*index.indices(k.shape[2])) if isinstance(index, slice) else index) > 0
