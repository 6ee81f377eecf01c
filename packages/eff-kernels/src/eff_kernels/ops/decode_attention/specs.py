"""Sample calls of decode_attention, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eff_kernels.testing.specs import Draw, Spec


def _case(name: str, b: int, h: int, kv: int, s: int, d: int, *, cache: Any = None, **options: Any) -> Spec:
    def make(draw: Draw) -> tuple[Any, ...]:
        q = draw.normal(b, h, d)
        k, v = (draw.normal(b, kv, s, d, dtype=cache) for _ in range(2))
        lengths = draw.integers(b, low=0, high=s + 1, dtype=torch.int32)
        lengths[-1:] = s
        return q, k, v, lengths

    return Spec(name, make, kwargs=options, tags=frozenset(options.pop("tags", ())))


def paged(k: Tensor, v: Tensor, page: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, KV, S, D] as pages [P, KV, page, D] in random order, with the block table [B, pages]."""
    batch, heads, keys, d = k.shape
    count = -(-keys // page)
    order = torch.randperm(batch * count, generator=generator)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(batch * count))
    pages = []
    for cache in (k, v):
        rows = torch.nn.functional.pad(cache, (0, 0, 0, count * page - keys))
        pages.append(rows.unflatten(2, (count, page)).transpose(1, 2).reshape(batch * count, heads, page, d)[order])
    return pages[0], pages[1], place.view(batch, count).to(device=k.device, dtype=torch.int32)


def _runs(name: str, b: int, h: int, kv: int, s: int, d: int, run: int, count: int, *, per_head: bool) -> Spec:
    """Rows chosen from a cache without pages, the last run cut short."""

    def make(draw: Draw) -> tuple[Any, ...]:
        q = draw.normal(b, h, d)
        k, v = (draw.normal(b, kv, s, d) for _ in range(2))
        lengths = draw.integers(b, low=0, high=run * count, dtype=torch.int32)
        shape = (b, kv, count) if per_head else (b, count)
        return q, k, v, lengths, draw.integers(*shape, low=0, high=s - run + 1, dtype=torch.int32)

    return Spec(name, make, kwargs={"run": run})


def _page_choice(name: str, b: int, h: int, kv: int, pages: int, page: int, d: int, count: int) -> Spec:
    """Each key-value head has pages of its own choice."""

    def make(draw: Draw) -> tuple[Any, ...]:
        q = draw.normal(b, h, d)
        k, v = (draw.normal(pages, kv, page, d) for _ in range(2))
        lengths = draw.integers(b, low=0, high=page * count + 1, dtype=torch.int32)
        return q, k, v, lengths, draw.integers(b, kv, count, low=0, high=pages, dtype=torch.int32)

    return Spec(name, make)


SPECS = (
    _case("smollm2", 2, 9, 3, 70, 64),
    _case("multi-query", 3, 8, 1, 130, 40),
    _case("multi-head", 2, 4, 4, 7, 8),
    _case("long", 1, 4, 2, 1100, 16),
    _case("wide-head", 2, 10, 2, 65, 128, scale=0.3),
    _case("float-cache", 2, 6, 2, 33, 32, cache=torch.float32),
    _runs("runs", 2, 6, 2, 150, 32, 16, 7, per_head=False),
    _runs("runs-of-each-head", 3, 9, 3, 200, 64, 48, 6, per_head=True),
    _page_choice("pages-of-each-head", 2, 4, 2, 9, 32, 16, 20),
    _case("no-batch", 0, 4, 2, 8, 16, tags=["empty"]),
)


_SCORE_BLOCKS = {"smollm2": 64, "multi-query": 128, "runs-of-each-head": 192, "pages-of-each-head": 128, "no-batch": 64}
SCORED_SPECS = tuple(
    Spec(s.name, s.make, {**s.kwargs, "score_block": _SCORE_BLOCKS[s.name]}, s.tags)
    for s in SPECS
    if s.name in _SCORE_BLOCKS
)
