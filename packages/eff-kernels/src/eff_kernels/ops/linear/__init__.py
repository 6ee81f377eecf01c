"""Multiplication by a float weight, each row independent of the batch."""

from eff_kernels.ops.linear.api import linear

__all__ = ["linear"]
