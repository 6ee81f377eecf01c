"""Putting the branches of all layers into one latent, back to front (LayerBind, equation 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eff_guidance.layerbind.alpha import Foreground, estimate_foreground_alpha
from eff_guidance.layerbind.config import LayerBindConfig
from eff_guidance.layerbind.regions import Region, overlaps_earlier


class Blended(NamedTuple):
    """One latent of all layers.

    Attributes:
        latents: [B, N, C], as the background's.
        alphas: How much each layer covered, float32 [B, n] each.
        masks: What belongs to each layer, bool [B, n] each.
    """

    latents: Tensor
    alphas: list[Tensor]
    masks: list[Tensor]


def blend_branches(
    background: Tensor, branches: Sequence[Tensor], regions: Sequence[Region], config: LayerBindConfig
) -> Blended:
    """Paste branches into the background, the furthest first.

    A layer that meets none before it is pasted whole. One that does is pasted as its alpha says: the given one, the
    estimated one, or 1 with ``alpha_mode="direct"``.

    Args:
        background: Packed latents [B, N, C].
        branches: Packed latents of the regions, [B, n, C] each.
        regions: Their tokens.
        config: The settings.
    """
    now, alphas, masks = background.float().clone(), [], []
    for branch, region, covers in zip(branches, regions, overlaps_earlier(regions), strict=True):
        here = now[:, region.idx]
        alpha, mask = _foreground(branch, here, region, covers, config)
        now[:, region.idx] = alpha[..., None] * branch.float() + (1 - alpha[..., None]) * here
        alphas.append(alpha)
        masks.append(mask)
    return Blended(now.to(background.dtype), alphas, masks)


def _foreground(branch: Tensor, here: Tensor, region: Region, covers: bool, config: LayerBindConfig) -> Foreground:
    if region.alpha is not None:
        alpha = region.alpha.to(branch.device).expand(len(branch), -1)
        return Foreground(alpha, alpha > 0)
    if covers and config.alpha_mode == "estimate":
        return estimate_foreground_alpha(
            branch, here, region, gamma=config.gamma, poisson_lambda=config.poisson_lambda,
            core_component=config.core_component,
        )  # fmt: skip
    return whole(region, len(branch))


def whole(region: Region, count: int) -> Foreground:
    """A layer that covers its whole region on ``count`` pictures, or what its given alpha covers."""
    one = torch.ones(count, len(region.idx), device=region.idx.device)
    if region.alpha is not None:
        one = region.alpha.expand(count, -1)
    return Foreground(one, one > 0)
