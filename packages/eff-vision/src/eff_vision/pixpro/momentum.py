"""Momentum copies."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


def momentum_at(step: int, total_steps: int, start: float = 0.99) -> float:
    """Momentum at a step: from ``start`` to 1 along half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * min(step, total_steps) / total_steps) + 1) / 2


class MomentumCopy(nn.Module):
    """A copy of a module whose weights follow it slowly: ``t = m t + (1 - m) s``; never trained itself.

    Call `step` once for each step of the optimiser, before the copy is next used. Buffers such as the statistics of
    batch norm are the copy's own. The copy's weights are buffers: they change without being trained, so that whoever
    saves what is trained and buffers, or checks that frozen parameters stay, does right by them.

    Args:
        module: What to follow.
        total_steps: Steps of the training.
        momentum: At the first step.
    """

    steps: Tensor

    def __init__(self, module: nn.Module, total_steps: int, momentum: float = 0.99) -> None:
        super().__init__()
        if total_steps < 1:
            raise ValueError(f"total_steps must be 1 or more, got {total_steps}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
        self.copy = copy.deepcopy(module)
        for part in self.copy.modules():
            for name, value in list(part.named_parameters(recurse=False)):
                delattr(part, name)
                part.register_buffer(name, value.detach())
        self.total_steps, self.momentum = total_steps, momentum
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self, module: nn.Module) -> float:
        """Move towards ``module``; returns the momentum that was used."""
        m = momentum_at(int(self.steps), self.total_steps, self.momentum)
        for name, source in module.named_parameters():
            self.copy.get_buffer(name).mul_(m).add_(source, alpha=1 - m)
        self.steps += 1
        return m

    @torch.no_grad()
    def forward(self, *args: Tensor) -> Tensor:
        """The copy's answer, without gradients."""
        return self.copy(*args)
