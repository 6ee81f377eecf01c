"""Causal softmax whose scores belong to the keys alone: a running weighted mean of the values."""

from eff_kernels.ops.self_gated_scan.api import SelfGatedScanOutput, self_gated_scan

__all__ = ["SelfGatedScanOutput", "self_gated_scan"]
