"""Rows of all processes, in order of rank, where each may have another number of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def gather_rows(rows: Tensor, group: Any = None) -> Tensor:
    """The rows [n, ...] of each process one after the other, the same on all; ``rows`` itself without processes.

    Shorter ones are padded on the way, so that a smaller last batch, or none, does not hold the others up. All
    processes must call this.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return rows
    world = dist.get_world_size(group)
    own = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(world)]
    dist.all_gather(counts, own, group=group)
    sizes = [int(n) for n in counts]
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded.contiguous(), group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
