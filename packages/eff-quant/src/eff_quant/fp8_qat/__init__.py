"""FP8-aware training with a frozen backbone (Lite3R, arXiv 2605.11354), and linear layers that store FP8."""

from eff_quant.fp8_qat.config import FP8Config, FP8QATConfig, FP8Spec
from eff_quant.fp8_qat.convert import convert_qat_
from eff_quant.fp8_qat.fake import fake_quant_fp8
from eff_quant.fp8_qat.files import load_compressed_fp8, save_compressed_fp8
from eff_quant.fp8_qat.layer import FP8Linear
from eff_quant.fp8_qat.method import METHOD
from eff_quant.fp8_qat.qat import FP8QATLinear, QATHandle, freeze_except_, prepare_qat_

__all__ = [
    "METHOD",
    "FP8Config",
    "FP8Linear",
    "FP8QATConfig",
    "FP8QATLinear",
    "FP8Spec",
    "QATHandle",
    "convert_qat_",
    "fake_quant_fp8",
    "freeze_except_",
    "load_compressed_fp8",
    "prepare_qat_",
    "save_compressed_fp8",
]
