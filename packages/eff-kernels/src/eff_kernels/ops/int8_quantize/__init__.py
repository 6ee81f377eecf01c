"""Row-wise and column-wise int8 quantisation with outlier detection."""

from eff_kernels.ops.int8_quantize.api import Int8Columns, Int8Rows, int8_quantize_columns, int8_quantize_rows

__all__ = ["Int8Columns", "Int8Rows", "int8_quantize_columns", "int8_quantize_rows"]
