"""Losses of a style adapter on a frozen model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 1000  # of the schedules that these models were trained with


class Dropout(NamedTuple):
    """Which samples of a batch lose their conditions: ``text`` and ``style``, bool [B] each."""

    text: Tensor
    style: Tensor


def condition_dropout(
    batch: int, *, text: float = 0.1, style: float = 0.1, both: float = 0.05, generator: torch.Generator | None = None
) -> Dropout:
    """Draw for each sample whether it loses its text, its style, or both, so that each can be guided.

    Raises:
        ValueError: the shares are negative, or more than 1 together.
    """
    if min(text, style, both) < 0 or text + style + both > 1:
        raise ValueError(f"text={text}, style={style}, both={both}; wanted shares that sum to at most 1")
    draw = torch.rand(batch, generator=generator)
    joint = draw < both
    return Dropout(joint | ((draw >= both) & (draw < both + text)),
                   joint | ((draw >= both + text) & (draw < both + text + style)))  # fmt: skip


def training_loss(
    model: Any,
    pipe: Any,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    encoder_hidden_states: Tensor,
    *,
    scheduler: Any = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    statistics_weight: float = 0.01,
    statistics_below: float = 300.0,
    **model_kwargs: Any,
) -> Tensor:
    """The backbone's own loss: epsilon or v for SD1.5 and SDXL, velocity for rectified flows (SD3, FLUX).

    Args:
        model: The denoiser.
        pipe: The pipeline whose scheduler is asked, or None.
        latents: Clean latents, as the denoiser takes them (FLUX: packed), [B, ...].
        noise: Of the same shape.
        t: Timesteps, 0 to 1000, [B].
        encoder_hidden_states: Text, [B, T, d].
        scheduler: In place of the pipeline's.
        statistics: Mean and deviation of each channel of clean latents of the style, [C] each: adds
            `style_statistics_loss`.
        statistics_weight: Its factor.
        statistics_below: It is for samples with a timestep below.
        model_kwargs: Further arguments of the denoiser, such as ``pooled_projections``.

    Raises:
        ValueError: no scheduler is known, or it predicts something else.
    """
    scheduler = getattr(pipe, "scheduler", None) if scheduler is None else scheduler
    if scheduler is None:
        raise ValueError("no scheduler is known; add style to a pipeline, or pass scheduler=")
    flow = hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod")
    level = t.to(latents).reshape(-1, *[1] * (latents.dim() - 1))
    flux = type(model).__name__.startswith("Flux")
    if flow:
        sigma = level / _STEPS
        noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
    else:
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={kind!r}; wanted 'epsilon' or 'v_prediction'")
        noisy = scheduler.add_noise(latents, noise, t)
        target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, t)
    made = model(
        noisy, timestep=t / _STEPS if flux else t, encoder_hidden_states=encoder_hidden_states, return_dict=False,
        **model_kwargs,
    )[0]  # fmt: skip
    loss = F.mse_loss(made.float(), target.float())
    if statistics is None:
        return loss
    if flow:
        clean = noisy - sigma * made
    else:
        alpha = scheduler.alphas_cumprod.to(latents)[t.long()].reshape(level.shape)
        clean = (noisy - (1 - alpha).sqrt() * made) / alpha.sqrt()
        if kind == "v_prediction":
            clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * made
    late = t < statistics_below
    if not bool(late.any()):
        return loss
    return loss + statistics_weight * style_statistics_loss(clean[late], *statistics, channels=-1 if flux else 1)


def style_statistics_loss(latents: Tensor, mean: Tensor, std: Tensor, *, channels: int = 1) -> Tensor:
    """Squared distance of each sample's means and deviations by channel from those of a style, mean over samples.

    Args:
        latents: [B, C, h, w], or with ``channels=-1`` [B, N, C].
        mean: Means wanted, [C].
        std: Deviations wanted, [C].
        channels: Dimension of the channels.
    """
    flat = latents.float().movedim(channels, 1).flatten(2)
    far = (flat.mean(-1) - mean.to(flat)).square() + (flat.std(-1) - std.to(flat)).square()
    return far.sum(-1).mean()
