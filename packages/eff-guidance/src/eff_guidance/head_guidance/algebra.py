"""Guidance away from a damaged prediction (arXiv 2506.10978, equation 5)."""

from __future__ import annotations

from torch import Tensor


def guide(cond: Tensor, damaged: Tensor, *, scale: float) -> Tensor:
    """``cond + w (cond - damaged)``, for noise and velocity alike; 0 is off.

    diffusers' PAG guider without CFG writes ``damaged + s (cond - damaged)``, hence ``s = w + 1``.

    Args:
        cond: Prediction with the prompt.
        damaged: The same with damaged heads.
        scale: w.
    """
    return cond if scale == 0 else cond + scale * (cond - damaged)


def guide_with_cfg(cond: Tensor, uncond: Tensor, damaged: Tensor, *, guidance_scale: float, scale: float) -> Tensor:
    """``uncond + g (cond - uncond) + w (cond - damaged)``.

    Args:
        cond: Prediction with the prompt.
        uncond: Prediction with the negative or empty prompt.
        damaged: Prediction with the prompt and damaged heads.
        guidance_scale: g; 1 is off.
        scale: w; 0 is off.
    """
    guided = uncond + guidance_scale * (cond - uncond)
    return guided if scale == 0 else guided + scale * (cond - damaged)


def in_window(step: int, steps: int, start: float, stop: float) -> bool:
    """Whether step k of T lies in ``int(start T) <= k < int(stop T)``."""
    return int(start * steps) <= step < int(stop * steps)
