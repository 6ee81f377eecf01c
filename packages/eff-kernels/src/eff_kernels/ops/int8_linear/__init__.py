"""Linear layer with int8 weights: activations quantised on the fly, outlier columns in floating point."""

from eff_kernels.ops.int8_linear.api import int8_linear

__all__ = ["int8_linear"]
