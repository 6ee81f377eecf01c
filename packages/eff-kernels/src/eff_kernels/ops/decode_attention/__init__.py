"""Attention of one query per sequence over a key-value cache."""

from eff_kernels.ops.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
