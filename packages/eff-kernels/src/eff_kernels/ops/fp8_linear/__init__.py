"""Linear layer with FP8 weights; activations in floating point or rounded to FP8 on the fly."""

from eff_kernels.ops.fp8_linear.api import fp8_linear

__all__ = ["fp8_linear"]
