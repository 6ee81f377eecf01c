"""Which attention layers of a vision transformer carry segmentation, and pre-training a small one from such a layer.

Zhang and others, UNIP: Rethinking Pre-trained Attention Patterns for Infrared Semantic Segmentation (arXiv 2502.02257).
"""

from eff_vision.unip.distillation import (
    HADConfig,
    HybridAttentionDistillation,
    attention_divergence,
    feature_distance,
)
from eff_vision.unip.infrared import GreyTriplicate, InfraredMix, to_eight_bit
from eff_vision.unip.nmi import attention_distance, attention_entropy, attention_nmi
from eff_vision.unip.profile import LayerProfile, profile_attention, select_distill_layer
from eff_vision.unip.pyramid import LastLayerFPN
from eff_vision.unip.student import StudentConfig, StudentViT, rehead_last_block
from eff_vision.unip.tap import AttentionTap

__all__ = [
    "AttentionTap",
    "GreyTriplicate",
    "HADConfig",
    "HybridAttentionDistillation",
    "InfraredMix",
    "LastLayerFPN",
    "LayerProfile",
    "StudentConfig",
    "StudentViT",
    "attention_distance",
    "attention_divergence",
    "attention_entropy",
    "attention_nmi",
    "feature_distance",
    "profile_attention",
    "rehead_last_block",
    "select_distill_layer",
    "to_eight_bit",
]
