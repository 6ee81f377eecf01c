"""Learning rate and strength of the adapters, in cycles that grow."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from eff_vision.specvit.model import LolaSpecViT


class CyclicalLoraSchedule:
    """Cosine with warm restarts, twice as high for groups of adapters, and the adapters' strength with it.

    Within a cycle of length T at share u, ``c = (1 + cos(pi u)) / 2``: rates are ``eta_min + (lr0 - eta_min) c``, and
    for groups with ``"lora": True`` that times ``lora_lr_scale`` above ``eta_min``; the strength goes from its largest
    to its smallest. Call `step` after each epoch, or with a fraction during one.

    Args:
        optimizer: Its groups' rates are taken as lr0.
        model: Whose adapters get the strength.
        t0: Epochs of the first cycle.
        t_mult: Each cycle is so many times as long as the one before.
        eta_min: Least rate.
        lora_lr_scale: Factor of the adapters' rate.
        strength: Least and largest strength.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: LolaSpecViT,
        *,
        t0: int = 10,
        t_mult: int = 2,
        eta_min: float = 1e-6,
        lora_lr_scale: float = 2.0,
        strength: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        if t0 < 1 or t_mult < 1:
            raise ValueError(f"t0 and t_mult must be 1 or more, got {t0} and {t_mult}")
        if not 0 <= strength[0] <= strength[1]:
            raise ValueError(f"strength must be ordered and not negative, got {strength}")
        self.optimizer, self.model = optimizer, model
        self.t0, self.t_mult, self.eta_min, self.scale, self.range = t0, t_mult, eta_min, lora_lr_scale, strength
        self._start = [g.setdefault("initial_lr", g["lr"]) for g in optimizer.param_groups]
        self.epoch = 0.0
        self._apply()

    def cycle(self, epoch: float) -> tuple[float, int]:
        """Share of the cycle that is over at an epoch, and the cycle's length."""
        length = self.t0
        while epoch >= length:
            epoch -= length
            length *= self.t_mult
        return epoch / length, length

    def step(self, epoch: float | None = None) -> None:
        """Go to an epoch, by default the next."""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        self._apply()

    def _apply(self) -> None:
        share, _ = self.cycle(self.epoch)
        c = (1 + math.cos(math.pi * share)) / 2
        for group, start in zip(self.optimizer.param_groups, self._start, strict=True):
            factor = self.scale if group.get("lora") else 1.0
            group["lr"] = self.eta_min + (start - self.eta_min) * c * factor
        self.strength = self.range[0] + (self.range[1] - self.range[0]) * c
        self.model.set_strength(self.strength)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"epoch": self.epoch, "start": list(self._start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._start = list(state["start"])
        self.step(state["epoch"])
