"""Experts of a mixture that are held as codes, run by their tokens alone."""

from eff_quant.experts.module import QuantizedExperts, check_no_experts

__all__ = ["QuantizedExperts", "check_no_experts"]
