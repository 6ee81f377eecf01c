"""What losses on the hidden states of a model in training share: its blocks, when the losses end, their state."""

from eff_guidance.training.phase import PhasedLoss
from eff_guidance.training.students import find_blocks, picture_tokens, unwrapped
from eff_guidance.training.triggers import FixedStepTrigger, GradientAngleTrigger, Trigger, gradient_cosine

__all__ = [
    "FixedStepTrigger",
    "GradientAngleTrigger",
    "PhasedLoss",
    "Trigger",
    "find_blocks",
    "gradient_cosine",
    "picture_tokens",
    "unwrapped",
]
