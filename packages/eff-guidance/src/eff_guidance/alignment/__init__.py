"""HASTE: a diffusion transformer's features and attention follow a vision transformer's, for a time (2505.16792)."""

from eff_guidance.alignment.align import AlignmentLosses, HolisticAlignment, make_projector
from eff_guidance.alignment.config import STOP, HolisticAlignmentConfig
from eff_guidance.alignment.losses import attention_alignment_loss, feature_alignment_loss
from eff_guidance.alignment.resize import resize_attention, resize_tokens
from eff_guidance.alignment.teacher import TeacherAdapter, TeacherTargets
from eff_guidance.training import FixedStepTrigger, GradientAngleTrigger, gradient_cosine

__all__ = [
    "STOP",
    "AlignmentLosses",
    "FixedStepTrigger",
    "GradientAngleTrigger",
    "HolisticAlignment",
    "HolisticAlignmentConfig",
    "TeacherAdapter",
    "TeacherTargets",
    "attention_alignment_loss",
    "feature_alignment_loss",
    "gradient_cosine",
    "make_projector",
    "resize_attention",
    "resize_tokens",
]
