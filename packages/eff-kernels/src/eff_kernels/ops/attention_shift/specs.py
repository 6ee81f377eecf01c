"""Sample calls of scale_weights and move_weights, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec

SCALE = 0.125


def attention(draw: Draw, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Queries, keys, values, output and log-sum-exps of causal attention of (B, H, KV, Sq, S, D, Dv)."""
    batch, heads, kv, count, keys, d, dv = shape
    q, k = draw.normal(batch, heads, count, d, scale=2.0), draw.normal(batch, kv, keys, d, scale=2.0)
    v = draw.normal(batch, kv, keys, dv)
    shared = [h * kv // heads for h in range(heads)]
    scores = q.double() @ k[:, shared].double().mT * SCALE
    hidden = torch.ones(count, keys, dtype=torch.bool, device=draw.device).triu(keys - count + 1)
    scores = scores.masked_fill(hidden, -torch.inf)
    out = (scores.softmax(-1) @ v[:, shared].double()).to(v.dtype)
    return q, k, v, out, scores.logsumexp(-1).float()


def _scaled(
    name: str, *shape: int, heads: tuple[int, ...] | None = None, share: float = 0.1, tags: tuple[str, ...] = ()
) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        which = list(range(shape[1]) if heads is None else heads)
        columns = draw.uniform(shape[0], len(which), shape[4], dtype=torch.float32) < share
        return *attention(draw, shape), SCALE, columns, 0.4, which

    return Spec(name, make, tags=frozenset(tags))


def _moved(name: str, *shape: int, by_sinks: bool = False, tags: tuple[str, ...] = ()) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        kind = draw.integers(shape[0], shape[4], low=0, high=7)
        asked = draw.uniform(shape[0], shape[3], dtype=torch.float32) < 0.6
        masks = kind == 1, kind == 2, kind == 3
        return *attention(draw, shape), SCALE, *masks, asked, 0.6, 0.5, 0.2, by_sinks

    return Spec(name, make, tags=frozenset(tags))


SCALE_SPECS = (
    _scaled("all-heads", 1, 6, 2, 70, 70, 32, 48),
    _scaled("some-heads", 2, 4, 4, 9, 40, 20, 16, heads=(3, 1), share=0.3),
    _scaled("most-keys", 1, 3, 1, 33, 40, 16, 16, share=0.9),
    _scaled("no-keys", 2, 2, 1, 5, 8, 8, 8, share=0.0),
    _scaled("no-queries", 1, 2, 2, 0, 8, 8, 8, tags=("empty",)),
    _scaled("no-batch", 0, 2, 2, 3, 8, 8, 8, tags=("empty",)),
    _scaled("no-heads", 1, 2, 2, 3, 8, 8, 8, heads=(), tags=("empty",)),
)
MOVE_SPECS = (
    _moved("by-receivers", 1, 6, 2, 70, 70, 32, 48),
    _moved("by-sinks", 2, 4, 4, 9, 40, 20, 16, by_sinks=True),
    _moved("no-queries", 1, 2, 2, 0, 8, 8, 8, tags=("empty",)),
    _moved("no-batch", 0, 2, 2, 3, 8, 8, 8, tags=("empty",)),
)
BENCH_SPECS = tuple(  # SmolLM2-135M and Llama-3-8B
    _scaled(f"{h} heads of {d}, {keys} tokens, {share:.0%} of the keys", 1, h, kv, keys, keys, d, d, share=share)
    for h, kv, d in ((9, 3, 64), (32, 8, 128))
    for keys in (1000,)
    for share in (0.01, 0.1)
)
