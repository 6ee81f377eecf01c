"""The formula of two-scale guidance."""

from __future__ import annotations

from torch import Tensor


def two_scale_guidance(e_uncond: Tensor, e_text: Tensor, e_full: Tensor, w_text: float, w_style: float) -> Tensor:
    """e_uncond + w_text (e_text - e_uncond) + w_style (e_full - e_text).

    Args:
        e_uncond: Prediction with neither text nor style, any shape.
        e_text: With text.
        e_full: With text and style.
        w_text: Scale of text.
        w_style: Scale of style; equal to ``w_text`` this is classifier-free guidance, at 0 that of text alone.
    """
    return e_uncond + w_text * (e_text - e_uncond) + w_style * (e_full - e_text)
