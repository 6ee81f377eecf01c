"""Linear layers in integers: 4-bit weights that stay packed, or int8 weights, with int8 activations."""

from eff_kernels.ops.int4_linear.api import int4_linear, int8_static_linear
from eff_kernels.ops.int4_linear.common import int4_pack, int4_unpack

__all__ = ["int4_linear", "int4_pack", "int4_unpack", "int8_static_linear"]
