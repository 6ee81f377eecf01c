"""Which parts of a decoder can be rounded to FP4, and which cannot (arXiv 2603.08747)."""

from eff_quant.sensitivity.measure import Layer
from eff_quant.sensitivity.parts import Part, Parts, find_parts
from eff_quant.sensitivity.recipe import Recipe, make_recipe
from eff_quant.sensitivity.report import Pass, SensitivityReport
from eff_quant.sensitivity.sweep import sensitivity_sweep

__all__ = [
    "Layer",
    "Part",
    "Parts",
    "Pass",
    "Recipe",
    "SensitivityReport",
    "find_parts",
    "make_recipe",
    "sensitivity_sweep",
]
