"""Raise attention to the picture tokens that carry information (PAINT, arXiv 2501.12206; PAI, arXiv 2407.21771)."""

from eff_attention.grounded_attention.apply import PAINTHandle, apply_paint, informed_tokens_in
from eff_attention.grounded_attention.config import PAIConfig, PAINTConfig
from eff_attention.grounded_attention.functional import (
    boost_attention_logits,
    cls_patch_attention,
    local_tokens,
    received_attention,
    select_informed_tokens,
    spatial_tokens,
    summary_tokens,
)
from eff_attention.grounded_attention.guidance import TextGuidance
from eff_attention.grounded_attention.state import InformedTokens

__all__ = [
    "InformedTokens",
    "PAIConfig",
    "PAINTConfig",
    "PAINTHandle",
    "TextGuidance",
    "apply_paint",
    "boost_attention_logits",
    "cls_patch_attention",
    "informed_tokens_in",
    "local_tokens",
    "received_attention",
    "select_informed_tokens",
    "spatial_tokens",
    "summary_tokens",
]
