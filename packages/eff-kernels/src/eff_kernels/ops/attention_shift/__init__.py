"""The output of causal attention, changed as if the weights of some keys had been."""

from eff_kernels.ops.attention_shift.api import Attended, can_shift, move_weights, scale_weights

__all__ = ["Attended", "can_shift", "move_weights", "scale_weights"]
