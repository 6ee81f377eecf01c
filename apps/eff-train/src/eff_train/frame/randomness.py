"""All random states of a process: python, numpy, torch and its accelerators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_all(*seed: int) -> None:
    """Seed python, numpy and torch from the given numbers."""
    a, b, c = (int(x) for x in np.random.SeedSequence(seed).generate_state(3, np.uint32))
    random.seed(a)
    np.random.seed(b)  # noqa: NPY002  # libraries draw from the global state
    torch.manual_seed(c)


def random_state() -> dict[str, Any]:
    """All states, as tensors and numbers that a checkpoint can hold."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Take over what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """A block with random states reseeded; the states from before come back after it."""
    held = random_state()
    seed_all(seed)
    try:
        yield
    finally:
        set_random_state(held)
