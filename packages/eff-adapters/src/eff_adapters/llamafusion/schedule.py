"""The noise of DDPM with a cosine schedule (Nichol and Dhariwal, arXiv 2102.09672), and steps back from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alphas_cumprod(steps: int = 1000) -> Tensor:
    """Abar [steps], float32: the share of the picture's variance that is left after step t + 1.

    abar is cos((u + .008) / 1.008 * pi / 2) squared over its value at u = 0, with no step's beta above .999.
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0).float()


def _at(abar: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return abar.to(like.device)[t].view(-1, *[1] * (like.dim() - 1))


def add_noise(latents: Tensor, noise: Tensor, t: Tensor, steps: int = 1000) -> Tensor:
    """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, in float32.

    Args:
        latents: z_0, [n, ...].
        noise: eps, like ``latents``.
        t: int64 [n], from 0 to ``steps`` - 1.
        steps: Of the schedule.
    """
    left = _at(alphas_cumprod(steps), t, latents)
    return left.sqrt() * latents.float() + (1 - left).sqrt() * noise.float()


def velocity(latents: Tensor, noise: Tensor, t: Tensor, steps: int = 1000) -> Tensor:
    """Mix noise and latents, v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0, in float32 (arXiv 2202.00512, section 4).

    Args:
        latents: z_0, [n, ...].
        noise: eps, like ``latents``.
        t: int64 [n], from 0 to ``steps`` - 1.
        steps: Of the schedule.
    """
    left = _at(alphas_cumprod(steps), t, latents)
    return left.sqrt() * noise.float() - (1 - left).sqrt() * latents.float()


def noise_of_velocity(z: Tensor, v: Tensor, t: Tensor, steps: int = 1000) -> Tensor:
    """Eps = sqrt(1 - abar_t) z_t + sqrt(abar_t) v, in float32: the noise that a velocity stands for.

    Args:
        z: z_t, [n, ...].
        v: Like ``z``.
        t: int64 [n].
        steps: Of the schedule.
    """
    return add_noise(v, z, t, steps)  # a turn by the same angle as that from picture and noise to z_t


def noise_of_sample(z: Tensor, x: Tensor, t: Tensor, steps: int = 1000) -> Tensor:
    """Eps = (z_t - sqrt(abar_t) x) / sqrt(1 - abar_t), in float32: the noise between a picture and z_t.

    Args:
        z: z_t, [n, ...].
        x: Like ``z``.
        t: int64 [n].
        steps: Of the schedule.
    """
    left = _at(alphas_cumprod(steps), t, z)
    return (z.float() - left.sqrt() * x.float()) / (1 - left).sqrt()


def ddim_step(
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    earlier: Tensor,
    *,
    steps: int = 1000,
    eta: float = 0.0,
    noise: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """One step of DDIM (arXiv 2010.02502, equation 12) from z_t to an earlier time, in float32.

    Args:
        z: z_t, [n, ...].
        eps: Predicted noise, like ``z``.
        t: int64 [n].
        earlier: int64 [n]; -1 is the clean picture.
        steps: Of the schedule.
        eta: Fresh noise as a share of that of DDPM, which is 1; 0 is deterministic.
        noise: Standard normal like ``z``; needed with ``eta`` above 0.
        clip: Largest magnitude of the predicted picture; None lets it be.
    """
    z, eps = z.float(), eps.float()
    abar = alphas_cumprod(steps)
    left = _at(abar, t, z)
    before = _at(torch.cat([torch.ones(1), abar]), earlier + 1, z)
    clean = (z - (1 - left).sqrt() * eps) / left.sqrt()
    if clip is not None:
        clean = clean.clamp(-clip, clip)
        eps = (z - left.sqrt() * clean) / (1 - left).sqrt()
    sigma = eta * ((1 - before) / (1 - left) * (1 - left / before)).clamp(min=0).sqrt()
    made = before.sqrt() * clean + (1 - before - sigma**2).clamp(min=0).sqrt() * eps
    if eta > 0:
        if noise is None:
            raise ValueError(f"eta={eta} needs noise like z")
        made = made + sigma * noise.float()
    return made


def sampling_times(num_steps: int, steps: int = 1000) -> Tensor:
    """Times of a sampling loop, int64 [num_steps], from the last one down, evenly spaced.

    Raises:
        ValueError: there are more of them than the schedule has.
    """
    if not 1 <= num_steps <= steps:
        raise ValueError(f"num_steps={num_steps}; use 1 to {steps}")
    return torch.linspace(steps, 0, num_steps + 1, dtype=torch.float64)[:-1].round().long() - 1
