"""LLM.int8() (arXiv 2208.07339): linear layers in int8, activations on the fly, outlier columns apart."""

from eff_quant.llm_int8.bnb import convert_from_bnb_, load_bnb_int8, save_bnb_int8
from eff_quant.llm_int8.calibrate import ModuleOutliers, OutlierReport, outlier_report
from eff_quant.llm_int8.config import Int8Config
from eff_quant.llm_int8.layer import Int8Linear
from eff_quant.llm_int8.method import METHOD
from eff_quant.llm_int8.weight import dequantize_weight, quantize_weight

__all__ = [
    "METHOD",
    "Int8Config",
    "Int8Linear",
    "ModuleOutliers",
    "OutlierReport",
    "convert_from_bnb_",
    "dequantize_weight",
    "load_bnb_int8",
    "outlier_report",
    "quantize_weight",
    "save_bnb_int8",
]
