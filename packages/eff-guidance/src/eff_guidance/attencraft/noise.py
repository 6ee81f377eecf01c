"""Noise, times and targets of a scheduler: diffusion (epsilon, v) and flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Noiser:
    """Adds noise at random times and says what the model shall predict.

    Args:
        scheduler: Of diffusers: one with ``alphas_cumprod`` (DDPM, DDIM and others), or a flow matching one.
        seed: Of times and noise.

    Raises:
        ValueError: the scheduler's prediction type is unknown.
    """

    def __init__(self, scheduler: Any, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.flows = "FlowMatch" in type(scheduler).__name__
        self.kind = "flow" if self.flows else scheduler.config.prediction_type
        if self.kind not in ("flow", "epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={self.kind!r}; known are epsilon and v_prediction, and flow matching")
        self._dice = torch.Generator().manual_seed(seed)

    def predict(
        self, model: Any, latents: Tensor, text: Mapping[str, Any], times: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Prediction of a model for latents at a random time, and its target.

        Args:
            model: A UNet or a transformer.
            latents: [B, C, H, W].
            text: Arguments of its forward.
            times: Range of the time, shares of the schedule.
        """
        noise = torch.randn(latents.shape, generator=self._dice).to(latents)
        share = times[0] + (times[1] - times[0]) * float(torch.rand((), generator=self._dice))
        count = self.scheduler.config.num_train_timesteps
        if self.flows:
            time = torch.full((len(latents),), share * count, device=latents.device)
            noisy, target = (1 - share) * latents + share * noise, noise - latents
            pred: Tensor = model(hidden_states=noisy, timestep=time, return_dict=False, **text)[0]
            return pred, target
        step = torch.full((len(latents),), min(count - 1, int(share * count)), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, step)
        target = noise if self.kind == "epsilon" else self.scheduler.get_velocity(latents, noise, step)
        pred = model(noisy, step, return_dict=False, **text)[0]
        return pred, target
