"""Rotary position embedding."""

from eff_kernels.ops.rope.api import rope

__all__ = ["rope"]
