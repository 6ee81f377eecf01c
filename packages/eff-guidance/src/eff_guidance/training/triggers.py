"""When a loss is switched off for good: at a step, or when its gradient turns against that of the main loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Closure = Callable[[float], tuple[Tensor, Tensor]]


class Trigger(Protocol):
    """Says once that a phase is over."""

    def update(self, step: int, closure: Closure | None = None) -> bool:
        """Whether the phase is over at this step; once True, always True."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, of numbers, lists and dicts."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


class FixedStepTrigger:
    """Over from step ``step`` on, counted from 0: the loss takes part in steps 0 to ``step - 1``.

    Raises:
        ValueError: ``step`` is negative.
    """

    def __init__(self, step: int) -> None:
        if step < 0:
            raise ValueError(f"step={step}; use 0 or more")
        self.step, self.fired = step, False

    def update(self, step: int, closure: Closure | None = None) -> bool:
        """Whether the phase is over."""
        self.fired = self.fired or step >= self.step
        return self.fired

    def state_dict(self) -> dict[str, Any]:
        """Whether it has fired."""
        return {"fired": self.fired}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.fired = bool(state["fired"])


class GradientAngleTrigger:
    """Over when the gradients of the auxiliary and the main loss oppose each other (HASTE, appendix A.2).

    At step ``start`` and every ``every`` steps after it, ``closure(t)`` computes both losses at the noise level t, on
    the model without DistributedDataParallel around it: ``(auxiliary, main)``. The cosine of their gradients with
    respect to ``params`` is averaged over the noise levels and, with several processes, over these, so that all stop at
    the same step. The phase is over when the mean falls below ``threshold``. It depends on which parameters and noise
    levels are looked at; the paper takes one block, the one that is aligned.

    Args:
        params: Parameters to compare the gradients of.
        start: First step at which to look.
        every: Steps between two looks.
        threshold: Cosine below which it is over.
        timesteps: Noise levels, 0 for data and 1 for noise.

    Attributes:
        history: (step, mean cosine) of each look.

    Raises:
        ValueError: there are no parameters or noise levels, or a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        start: int = 50_000,
        every: int = 10_000,
        threshold: float = -0.05,
        timesteps: Sequence[float] = (0.02, 0.1, 0.5, 0.8),
    ) -> None:
        self.params = tuple(params)
        if not self.params or not timesteps:
            raise ValueError(f"{len(self.params)} parameters and {len(timesteps)} timesteps; give at least one of each")
        if start < 0 or every < 1 or not -1 <= threshold <= 1:
            raise ValueError(
                f"start={start}, every={every}, threshold={threshold}; use start >= 0, every >= 1 and a cosine"
            )
        self.start, self.every, self.threshold, self.timesteps = start, every, threshold, tuple(timesteps)
        self.fired, self.due = False, start
        self.history: list[tuple[int, float]] = []

    def update(self, step: int, closure: Closure | None = None) -> bool:
        """Whether the phase is over; looks where it is time to, with ``closure``.

        Raises:
            ValueError: it is time to look and there is no closure.
        """
        if self.fired or step < self.due:
            return self.fired
        if closure is None:
            raise ValueError(f"step {step} is one to compare gradients at, but there is no closure to compute losses")
        with torch.enable_grad():
            angles = [gradient_cosine(*closure(t), self.params) for t in self.timesteps]
        angle = _over_processes(sum(angles) / len(angles), self.params[0].device)
        self.history.append((step, angle))
        self.due = self.start + self.every * ((step - self.start) // self.every + 1)
        self.fired = angle < self.threshold
        return self.fired

    def state_dict(self) -> dict[str, Any]:
        """Whether it has fired, when it looks next, and what it saw."""
        return {"fired": self.fired, "due": self.due, "history": [list(pair) for pair in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.fired, self.due = bool(state["fired"]), int(state["due"])
        self.history = [(int(step), float(angle)) for step, angle in state["history"]]


def gradient_cosine(loss_a: Tensor, loss_b: Tensor, params: Iterable[Tensor]) -> float:
    """Cosine of the angle between the gradients of two losses, over all parameters together.

    A parameter that a loss does not depend on has gradient 0; if one gradient is 0 altogether, so is the cosine.
    ``.grad`` of the parameters is left alone, and the graphs of both losses stay usable.

    Args:
        loss_a: A scalar.
        loss_b: A scalar, of the same graph or another.
        params: Parameters, each counted once.
    """
    over = [p for p in dict.fromkeys(params) if p.requires_grad]
    both = [_gradients(loss, over) for loss in (loss_a, loss_b)]
    dot = squares_a = squares_b = 0.0
    for a, b in zip(*both, strict=True):
        a64, b64 = (None if g is None else g.double() for g in (a, b))
        squares_a += 0.0 if a64 is None else float(a64.square().sum())
        squares_b += 0.0 if b64 is None else float(b64.square().sum())
        dot += 0.0 if a64 is None or b64 is None else float((a64 * b64).sum())
    length = math.sqrt(squares_a) * math.sqrt(squares_b)
    return dot / length if length else 0.0


def _gradients(loss: Tensor, over: list[Tensor]) -> Sequence[Tensor | None]:
    if not loss.requires_grad or not over:
        return [None] * len(over)
    return torch.autograd.grad(loss, over, retain_graph=True, allow_unused=True)


def _over_processes(value: float, device: torch.device) -> float:
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = torch.tensor([value, 1.0], dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return float(total[0] / total[1])
