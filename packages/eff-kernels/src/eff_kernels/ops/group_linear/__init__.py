"""Multiplying by 4- and 8-bit weights with a scale for each group of 32 columns."""

from eff_kernels.ops.group_linear.api import group_linear
from eff_kernels.ops.group_linear.pack import GROUP, GroupWeight

__all__ = ["GROUP", "GroupWeight", "group_linear"]
