"""Quantisation of transformer models: the verb `quantize_`, its reverse, and the methods with their configs.

- `llm_int8`: LLM.int8(). `fp8_qat`: stored FP8, and training under its noise. `fp4`: NVFP4 and MXFP4.
- `quantvla`: 4-bit weights and 8-bit activations for policies. `experts`: experts stacked in one parameter.
- `sensitivity`: which layers bear FP4. `hf`: loading and saving with transformers and diffusers.

Importing this package loads torch and nothing larger; transformers, PEFT and bitsandbytes are imported by the functions
that need them.
"""

from importlib.metadata import version

from eff_quant.count import count_parameters
from eff_quant.experts import QuantizedExperts
from eff_quant.fp4 import (
    FP4Config,
    FP4Linear,
    InputRanges,
    calibrate_fp4,
    fake_fp4,
    load_fp4_checkpoint,
    save_fp4_checkpoint,
)
from eff_quant.fp8_qat import (
    FP8Config,
    FP8Linear,
    FP8QATConfig,
    FP8Spec,
    QATHandle,
    convert_qat_,
    fake_quant_fp8,
    freeze_except_,
    load_compressed_fp8,
    prepare_qat_,
    save_compressed_fp8,
)
from eff_quant.llm_int8 import (
    Int8Config,
    Int8Linear,
    OutlierReport,
    convert_from_bnb_,
    load_bnb_int8,
    outlier_report,
    save_bnb_int8,
)
from eff_quant.load import load
from eff_quant.lora import merge_lora
from eff_quant.mixed import MixedConfig
from eff_quant.parallel import keep_codes_local_
from eff_quant.quantize import dequantize_, quantize_
from eff_quant.quantvla import (
    ActivationCalibration,
    AttentionStats,
    QuantizedPolicy,
    QuantLayout,
    ScaleMatchConfig,
    ScaleTable,
    W4A8Config,
    W4A8Linear,
    apply_scale_table,
    calibrate_activations,
    calibrate_scales,
    calibrate_vla,
    collect_attention_stats,
    quantize_layout_,
)
from eff_quant.sensitivity import Recipe, SensitivityReport, sensitivity_sweep

__all__ = [
    "ActivationCalibration",
    "AttentionStats",
    "FP4Config",
    "FP4Linear",
    "FP8Config",
    "FP8Linear",
    "FP8QATConfig",
    "FP8Spec",
    "InputRanges",
    "Int8Config",
    "Int8Linear",
    "MixedConfig",
    "OutlierReport",
    "QATHandle",
    "QuantLayout",
    "QuantizedExperts",
    "QuantizedPolicy",
    "Recipe",
    "ScaleMatchConfig",
    "ScaleTable",
    "SensitivityReport",
    "W4A8Config",
    "W4A8Linear",
    "__version__",
    "apply_scale_table",
    "calibrate_activations",
    "calibrate_fp4",
    "calibrate_scales",
    "calibrate_vla",
    "collect_attention_stats",
    "convert_from_bnb_",
    "convert_qat_",
    "count_parameters",
    "dequantize_",
    "fake_fp4",
    "fake_quant_fp8",
    "freeze_except_",
    "keep_codes_local_",
    "load",
    "load_bnb_int8",
    "load_compressed_fp8",
    "load_fp4_checkpoint",
    "merge_lora",
    "outlier_report",
    "prepare_qat_",
    "quantize_",
    "quantize_layout_",
    "save_bnb_int8",
    "save_compressed_fp8",
    "save_fp4_checkpoint",
    "sensitivity_sweep",
]

__version__ = version("eff-quant")
