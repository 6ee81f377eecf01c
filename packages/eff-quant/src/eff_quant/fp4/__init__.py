"""FP4: linear layers in NVFP4 and MXFP4, fake quantisation, calibration, checkpoints of other libraries."""

from eff_quant.fp4.calibrate import InputRanges, calibrate_fp4
from eff_quant.fp4.checkpoint import load_fp4_checkpoint, save_fp4_checkpoint
from eff_quant.fp4.config import FP4Config
from eff_quant.fp4.fake import fake_fp4
from eff_quant.fp4.layer import FP4Linear
from eff_quant.fp4.layouts import from_layout, to_layout
from eff_quant.fp4.method import METHOD

__all__ = [
    "METHOD",
    "FP4Config",
    "FP4Linear",
    "InputRanges",
    "calibrate_fp4",
    "fake_fp4",
    "from_layout",
    "load_fp4_checkpoint",
    "save_fp4_checkpoint",
    "to_layout",
]
