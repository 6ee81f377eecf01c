"""Land-cover maps from hyperspectral pictures: a convolutional stem, window attention and low-rank adapters.

LoLA-SpecViT: Local Attention SwiGLU Vision Transformer with LoRA for Hyperspectral Imaging (arXiv 2506.17759), with
splits that do not leak and adapters that begin as the identity.
"""

from eff_vision.specvit.config import LolaSpecViTConfig
from eff_vision.specvit.lora import LoraLinear
from eff_vision.specvit.metrics import HsiScores, oa_aa_kappa
from eff_vision.specvit.model import LolaSpecViT
from eff_vision.specvit.patches import HsiPatches
from eff_vision.specvit.predict import predict_map
from eff_vision.specvit.reduce import PCAReducer
from eff_vision.specvit.scene import HsiScene, load_hsi
from eff_vision.specvit.schedule import CyclicalLoraSchedule
from eff_vision.specvit.split import HsiSplit, hsi_split, split_overlap

__all__ = [
    "CyclicalLoraSchedule",
    "HsiPatches",
    "HsiScene",
    "HsiScores",
    "HsiSplit",
    "LolaSpecViT",
    "LolaSpecViTConfig",
    "LoraLinear",
    "PCAReducer",
    "hsi_split",
    "load_hsi",
    "oa_aa_kappa",
    "predict_map",
    "split_overlap",
]
