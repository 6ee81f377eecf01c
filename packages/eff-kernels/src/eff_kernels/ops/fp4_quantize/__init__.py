"""The 4-bit float formats NVFP4 and MXFP4: encoding, decoding, packing."""

from eff_kernels.ops.fp4_quantize.api import FP4Codes, fp4_dequantize, fp4_quantize

__all__ = ["FP4Codes", "fp4_dequantize", "fp4_quantize"]
