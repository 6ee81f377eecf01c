"""Two-scale guidance: text and style with a scale of their own."""

from __future__ import annotations

from typing import Any

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


def style_guider(handle: Any, *, text_scale: float = 7.5, style_scale: float = 7.5, **options: Any) -> Any:
    """A guider of diffusers for modular pipelines: three passes and `two_scale_guidance`.

    Args:
        handle: The `StyleAttentionHandle` of the pipeline's denoiser.
        text_scale: w_text.
        style_scale: w_style.
        options: Of the uses of style, as for `StyleAttentionHandle.use` (``style_ids``, ``strength``, ...).
    """
    from eff_guidance.pokefusion.guider import TwoScaleGuidance

    guider = TwoScaleGuidance(text_scale=text_scale, style_scale=style_scale)
    guider.bind(handle, options)
    return guider
