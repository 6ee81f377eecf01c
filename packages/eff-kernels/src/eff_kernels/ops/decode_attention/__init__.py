"""Attention of one query per sequence over a key-value cache."""

from eff_kernels.ops.decode_attention.api import ScoredAttention, decode_attention, scored_decode_attention

__all__ = ["ScoredAttention", "decode_attention", "scored_decode_attention"]
