"""What each key gets from all queries of a causal attention."""

from eff_kernels.ops.attention_columns.api import AttentionColumns, attention_columns

__all__ = ["AttentionColumns", "attention_columns"]
