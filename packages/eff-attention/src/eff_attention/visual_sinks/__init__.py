"""Give the attention that picture tokens without content draw to those with content (VAR, arXiv 2503.03321)."""

from eff_attention.visual_sinks.apply import VARHandle, apply_var, visual_sinks_in
from eff_attention.visual_sinks.config import VARConfig
from eff_attention.visual_sinks.dims import find_sink_dims, known_sink_dims
from eff_attention.visual_sinks.functional import (
    image_centric_heads,
    redistribute_attention,
    sink_mask,
    sink_values,
)
from eff_attention.visual_sinks.statistics import LayerSinks

__all__ = [
    "LayerSinks",
    "VARConfig",
    "VARHandle",
    "apply_var",
    "find_sink_dims",
    "image_centric_heads",
    "known_sink_dims",
    "redistribute_attention",
    "sink_mask",
    "sink_values",
    "visual_sinks_in",
]
