"""Calibrate attention away from later sinks, without training (ACT, arXiv 2406.15765)."""

from eff_attention.sink_calibration.apply import ACTHandle, apply_act, sinks_in
from eff_attention.sink_calibration.config import ACTConfig
from eff_attention.sink_calibration.functional import calibrate_attention, find_attention_sinks
from eff_attention.sink_calibration.identity import model_hash
from eff_attention.sink_calibration.search import HeadSelection, HeadTrial, search_heads
from eff_attention.sink_calibration.sink_report import SinkReport, TokenSinks, sink_report
from eff_attention.sink_calibration.state import SinkState
from eff_attention.sink_calibration.statistics import HeadSinks

__all__ = [
    "ACTConfig",
    "ACTHandle",
    "HeadSelection",
    "HeadSinks",
    "HeadTrial",
    "SinkReport",
    "SinkState",
    "TokenSinks",
    "apply_act",
    "calibrate_attention",
    "find_attention_sinks",
    "model_hash",
    "search_heads",
    "sink_report",
    "sinks_in",
]
