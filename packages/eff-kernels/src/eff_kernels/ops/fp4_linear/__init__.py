"""Multiplication by a weight in packed 4-bit floats."""

from eff_kernels.ops.fp4_linear.api import fp4_linear

__all__ = ["fp4_linear"]
