"""Helpers for data that depends on the number of a sample alone, and moving batches to a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 1 << 40
"""Numbers of samples, or seeds, from here on are for the evaluation of recipes that make their data."""


def generator(seed: int, sample: int) -> np.random.Generator:
    """Random numbers of one sample: the same for the same seed and number, independent for all others."""
    return np.random.default_rng([seed, sample])


def torch_generator(seed: int, sample: int) -> torch.Generator:
    """As `generator`, for PyTorch's functions: a CPU generator of one sample."""
    mixed = np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def shuffled(samples: range, count: int, seed: int) -> list[int]:
    """Map numbers of samples to places in a data set of ``count`` items.

    Every ``count`` numbers in a row (an epoch) visit each place once, each epoch in an order of its own.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    orders: dict[int, np.ndarray] = {}
    places = []
    for sample in samples:
        epoch, place = divmod(sample, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        places.append(int(orders[epoch][place]))
    return places


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on ``device``; other leaves stay as they are."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        moved = {k: to_device(v, device) for k, v in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(v, device) for v in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **values)
    return batch
