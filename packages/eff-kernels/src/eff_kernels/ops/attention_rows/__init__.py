"""Attention of one query per sequence in two halves, so that its weights may be changed in between."""

from eff_kernels.ops.attention_rows.api import CalibratedRow, Limits, row_calibrated, row_scores, row_values

__all__ = ["CalibratedRow", "Limits", "row_calibrated", "row_scores", "row_values"]
