"""Strengthen the heads whose output depends on the picture (VHD and VHR, arXiv 2412.13949)."""

from eff_attention.head_reinforcement.apply import VHRHandle, apply_vhr, chosen_heads, vhr_generate
from eff_attention.head_reinforcement.config import VHRConfig
from eff_attention.head_reinforcement.functional import (
    reject_negative_heads,
    select_heads,
    token_vhd,
    vision_aware_divergence,
)
from eff_attention.head_reinforcement.trace import head_outputs, trace_tvhd

__all__ = [
    "VHRConfig",
    "VHRHandle",
    "apply_vhr",
    "chosen_heads",
    "head_outputs",
    "reject_negative_heads",
    "select_heads",
    "token_vhd",
    "trace_tvhd",
    "vhr_generate",
    "vision_aware_divergence",
]
