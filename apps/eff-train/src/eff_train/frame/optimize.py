"""The learning rate of a step, and a running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eff_train.frame.options import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of update ``step`` (from 0): a linear rise over ``warmup`` updates, then the schedule.

    The last update of cosine and linear has ``lr * lr_end``, the last of the warm-up has ``lr``.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    done = min(done, 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.lr_end + (1 - config.lr_end) * left)


class Average:
    """Exponential running average of a model's trained parameters, kept in float32.

    The decay of early updates is smaller, ``min(decay, (1 + n) / (10 + n))``, so that the first weights do not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {
            n: p.detach().to(torch.float32, copy=True) for n, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's parameters after update number ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if name in self.values:
                self.values[name].lerp_(parameter.detach().float(), 1 - decay)


@contextmanager
def swapped(model: nn.Module, values: dict[str, Tensor]) -> Iterator[nn.Module]:
    """The model with ``values`` in place of parameters, which come back bit for bit."""
    held = {n: p.detach().clone() for n, p in model.named_parameters() if n in values}
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        yield model
    finally:
        with torch.no_grad():
            for name, value in held.items():
                parameters[name].copy_(value)
