"""LARS: momentum SGD whose step is scaled by each tensor's own size (You and others, 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    Tensors of one dimension (biases and norms) get neither weight decay nor scaling.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        momentum: Of the velocity.
        weight_decay: Of tensors with two dimensions or more.
        trust: Step length as a share of the weights' norm.
        eps: Added to the norm of the gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        trust: float = 1e-3,
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if p.ndim > 1:
            gradient = gradient.add(p, alpha=group["weight_decay"])
            weights, slope = p.norm(), gradient.norm()
            ratio = torch.where(
                (weights > 0) & (slope > 0), group["trust"] * weights / (slope + group["eps"]), torch.ones_like(weights)
            )
            gradient = gradient * ratio
        velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
        velocity.mul_(group["momentum"]).add_(gradient)
        p.add_(velocity, alpha=-group["lr"])
