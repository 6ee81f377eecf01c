"""Running a model over calibration batches: the same noise each time, no dropout, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module, Any], object]
"""Runs a model on one batch, such as one whole rollout of the denoising steps."""


def default_run(model: nn.Module, batch: Any) -> object:
    """Call ``model`` with a mapping of keyword arguments, a tuple of arguments, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def run_batches(
    model: nn.Module, batches: Iterable[Any], run: Run | None, seed: int
) -> Iterator[tuple[Any, Callable[[], object]]]:
    """Yield each batch and a function that runs it; the i-th always sees the random numbers of ``seed + i``.

    Meanwhile the model is in evaluation mode; its modules' modes and the state of the generators are put back.

    Raises:
        ValueError: no batches.
    """
    run = run or default_run
    modes = {m: m.training for m in model.modules()}
    count = 0
    model.eval()
    try:
        for i, batch in enumerate(batches):
            count += 1

            def go(i: int = i, batch: Any = batch) -> object:
                with torch.random.fork_rng(), torch.no_grad():
                    torch.manual_seed(seed + i)
                    return run(model, batch)

            yield batch, go
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ValueError("no batches to calibrate with; give at least one, 32 observations are usual")


def padding(batch: Any) -> Tensor | None:
    """The ``attention_mask`` [B, T] of a batch of keyword arguments, as bool: False is padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


@contextmanager
def removed(hooks: list[Any]) -> Iterator[None]:
    """Take hooks away at the end of a block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
