"""QuantVLA (arXiv 2602.20309): W4A8 for encoders with a diffusion-transformer head, attention scales matched."""

from eff_quant.quantvla.apply import ScaleHandle, apply_scale_table
from eff_quant.quantvla.calibrate import ActivationCalibration, calibrate_activations
from eff_quant.quantvla.config import W4A8Config
from eff_quant.quantvla.layer import LayerCalibration, W4A8Linear
from eff_quant.quantvla.layout import QuantLayout
from eff_quant.quantvla.method import METHOD, QuantizedPolicy, calibrate_vla, quantize_layout_
from eff_quant.quantvla.scales import ModuleScales, ScaleMatchConfig, ScaleTable, calibrate_scales
from eff_quant.quantvla.stats import AttentionStats, ModuleStats, collect_attention_stats

__all__ = [
    "METHOD",
    "ActivationCalibration",
    "AttentionStats",
    "LayerCalibration",
    "ModuleScales",
    "ModuleStats",
    "QuantLayout",
    "QuantizedPolicy",
    "ScaleHandle",
    "ScaleMatchConfig",
    "ScaleTable",
    "W4A8Config",
    "W4A8Linear",
    "apply_scale_table",
    "calibrate_activations",
    "calibrate_scales",
    "calibrate_vla",
    "collect_attention_stats",
    "quantize_layout_",
]
