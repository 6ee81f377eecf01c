"""Rounding of rows to FP8 by their largest magnitude."""

from eff_kernels.ops.fp8_quantize.api import FP8Rows, fp8_quantize, fp8_round

__all__ = ["FP8Rows", "fp8_quantize", "fp8_round"]
