"""Causal attention with the second-order Taylor polynomial of exp for weights, in time linear in the tokens."""

from eff_kernels.ops.taylor_linear_attention.api import TaylorAttentionOutput, taylor_linear_attention
from eff_kernels.ops.taylor_linear_attention.common import taylor_state_shape

__all__ = ["TaylorAttentionOutput", "taylor_linear_attention", "taylor_state_shape"]
