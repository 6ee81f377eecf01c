"""Overwriting rows of a table."""

from eff_kernels.ops.row_write.api import row_write

__all__ = ["row_write"]
