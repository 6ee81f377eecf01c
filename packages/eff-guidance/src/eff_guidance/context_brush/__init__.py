"""In-Context Brush: paint the subject of one picture into a hole of another (arXiv 2505.20271)."""

from eff_guidance.context_brush.apply import BrushHandle, apply_incontext_brush
from eff_guidance.context_brush.attention import (
    Shifted,
    attend_with_lse,
    head_gains_from_mass,
    shift_attention_output,
)
from eff_guidance.context_brush.blend import LatentBlendCallback, noised_source
from eff_guidance.context_brush.canvas import Canvas, build_incontext_canvas, stitch
from eff_guidance.context_brush.config import ContextBrushConfig
from eff_guidance.context_brush.insert import incontext_insert
from eff_guidance.context_brush.spans import CanvasSpans

__all__ = [
    "BrushHandle",
    "Canvas",
    "CanvasSpans",
    "ContextBrushConfig",
    "LatentBlendCallback",
    "Shifted",
    "apply_incontext_brush",
    "attend_with_lse",
    "build_incontext_canvas",
    "head_gains_from_mass",
    "incontext_insert",
    "noised_source",
    "shift_attention_output",
    "stitch",
]
