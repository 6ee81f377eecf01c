"""Muon for weight matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Groups with ``muon=True`` take steps of orthogonal direction, all others AdamW's.

    A matrix's momentum is replaced by the nearest matrix with orthonormal rows or columns, so that all directions are
    learnt at one speed (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; the polynomial is
    from there). Kernels of convolutions count as matrices [out, in x height x width]. Small networks reach a given loss
    in about half of AdamW's updates.

    Args:
        params: Groups of parameters. Keys of a group: ``lr``, ``weight_decay``, ``muon``.
        lr: Default learning rate.
        betas: Decays of AdamW's moments.
        momentum: Decay of Muon's momentum.
        weight_decay: Default decay, decoupled, for both kinds.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay, "muon": False}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(found, 1 - group["lr"] * group["weight_decay"])
            changes = self._orthogonal(found, group) if group["muon"] else [self._adam(p, group) for p in found]
            for p, change in zip(found, changes, strict=True):
                p.sub_(change, alpha=group["lr"])
        return loss

    def _orthogonal(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        aims: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for i, p in enumerate(params):
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            aim = p.grad.lerp(average, group["momentum"]).flatten(1)
            aims.setdefault(tuple(aim.shape), []).append((i, aim))
        changes: dict[int, Tensor] = {}
        for alike in aims.values():  # matrices of one shape together: many small products are slow
            made = orthogonal(torch.stack([aim for _, aim in alike]))
            changes |= {i: change.view_as(params[i]) for (i, _), change in zip(alike, made, strict=True)}
        return [changes[i] for i in range(len(params))]

    def _adam(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        gradient: Tensor = p.grad  # type: ignore[assignment]
        state = self.state[p]
        if not state:
            state.update(step=torch.zeros(()), first=torch.zeros_like(p), second=torch.zeros_like(p))
        state["step"] += 1
        one, two = group["betas"]
        count = float(state["step"])
        first = state["first"].lerp_(gradient, 1 - one) / (1 - one**count)
        second = state["second"].lerp_(gradient.square(), 1 - two) / (1 - two**count)
        return first / (second.sqrt() + 1e-8)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move all singular values of matrices [..., m, n] near 1 by Newton-Schulz steps, rows then scaled to unit size."""
    rows, columns = matrices.shape[-2:]
    x = matrices.bfloat16()
    x = x.mT if rows > columns else x
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    x = x.mT if rows > columns else x
    return x.to(matrices.dtype) * max(1.0, rows / columns) ** 0.5


def muon_groups(model: torch.nn.Module, *, lr_scale: float, plain: tuple[str, ...]) -> list[dict[str, Any]]:
    """Groups of a model's parameters: matrices and kernels by Muon, first and last layers and vectors by AdamW.

    Args:
        model: Its parameters without a gradient are left out.
        lr_scale: Learning rate of Muon's group as a multiple of the other's.
        plain: Parts of names whose matrices AdamW trains: layers next to the data, and what only scales.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrix = {n for n, p in named if p.ndim >= 2 and not any(part in n for part in plain)}
    return [
        {"params": [p for n, p in named if n in matrix], "lr_scale": lr_scale, "muon": True},
        {"params": [p for n, p in named if n not in matrix], "weight_decay": 0.0},
    ]
