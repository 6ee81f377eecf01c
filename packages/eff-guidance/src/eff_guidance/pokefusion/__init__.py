"""PokeFusion attention: a learnt style in a frozen model, without a reference picture (arXiv 2602.03220)."""

from eff_guidance.pokefusion.adapter import StyleAdapter, StyleLayer, StyleProjection
from eff_guidance.pokefusion.config import StyleAttentionConfig
from eff_guidance.pokefusion.guidance import style_guider
from eff_guidance.pokefusion.handle import StyleAttentionHandle, add_style_attention
from eff_guidance.pokefusion.layers import style_layers
from eff_guidance.pokefusion.scales import two_scale_guidance
from eff_guidance.pokefusion.train import Dropout, condition_dropout, style_statistics_loss, training_loss
from eff_guidance.pokefusion.use import StyleUse

__all__ = [
    "Dropout",
    "StyleAdapter",
    "StyleAttentionConfig",
    "StyleAttentionHandle",
    "StyleLayer",
    "StyleProjection",
    "StyleUse",
    "add_style_attention",
    "condition_dropout",
    "style_guider",
    "style_layers",
    "style_statistics_loss",
    "training_loss",
    "two_scale_guidance",
]
