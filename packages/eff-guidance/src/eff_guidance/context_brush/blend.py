"""Keeping what lies outside of the hole: latents are set back to the noised canvas after each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def noised_source(source: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Clean latents at a noise level of a rectified flow: (1 - sigma) * source + sigma * noise."""
    return (1 - sigma) * source + sigma * noise


class LatentBlendCallback:
    """``callback_on_step_end`` of diffusers' flow-matching pipelines (FLUX, FLUX Fill and inpainting, SD3 and its own).

    z <- z inside of the hole, (1 - s) * source + s * noise outside, with s the next noise level; after the last step,
    where s is 0, latents outside are those of the canvas, bit for bit. It keeps nothing between calls.

    Args:
        source: Latents of the canvas, in the form of the pipeline's (FLUX packs them), [B or 1, ...].
        noise: The noise that generation starts from, of the same form, [B, ...].
        hole: Where to paint, bool, broadcasts to the latents.
        then: A callback to call afterwards with the blended latents.
    """

    def __init__(
        self, source: Tensor, noise: Tensor, hole: Tensor, then: Callable[..., dict[str, Any]] | None = None
    ) -> None:
        if hole.dtype != torch.bool:
            raise TypeError(f"the hole must be bool, got {hole.dtype}")
        for name, value in (("source", source), ("noise", noise)):
            if value.dim() != hole.dim():
                raise ValueError(
                    f"{name} is {list(value.shape)}, the hole {list(hole.shape)}; wanted equally many dimensions"
                )
        torch.broadcast_shapes(source.shape, noise.shape, hole.shape)
        self.source, self.noise, self.hole, self.then = source, noise, hole, then

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Blend the latents of a pipeline that has just made its scheduler's step.

        Raises:
            KeyError: the pipeline does not hand over its latents.
            RuntimeError: its scheduler has no noise levels of a flow.
        """
        if "latents" not in kwargs:
            raise KeyError("callback_on_step_end_tensor_inputs must name 'latents'")
        kwargs["latents"] = self.blend(kwargs["latents"], next_sigma(pipe.scheduler))
        return kwargs if self.then is None else self.then(pipe, step, timestep, kwargs)

    def blend(self, latents: Tensor, sigma: float) -> Tensor:
        """Latents with everything outside of the hole taken from the canvas at a noise level."""
        kept = noised_source(self.source.to(latents), self.noise.to(latents), sigma)
        return torch.where(self.hole.to(latents.device), latents, kept)


def next_sigma(scheduler: Any) -> float:
    """Noise level that a flow-matching scheduler's latest step has come to."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None or index is None:
        raise RuntimeError(
            f"{type(scheduler).__name__} does not give the noise level after a step; blending needs a flow-matching "
            "scheduler that counts its steps, such as FlowMatchEulerDiscreteScheduler"
        )
    return float(sigmas[index])
