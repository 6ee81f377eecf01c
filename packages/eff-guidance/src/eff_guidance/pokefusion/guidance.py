"""The guider of two-scale guidance: text and style with a scale of their own."""

from __future__ import annotations

from typing import Any


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
