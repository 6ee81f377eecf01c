"""LMFusion, first called LlamaFusion: a text model reads and draws pictures with a second set of weights.

Shi, Han, Zhou, Liang, Lin, Zettlemoyer, Yu: "LMFusion: Adapting Pretrained Language Models for Multimodal Generation",
arXiv 2412.15188. Text stays bit-identical; every token goes through the weights of its own modality alone.
"""

from eff_adapters.llamafusion.config import ModalityTowerConfig
from eff_adapters.llamafusion.context import Context
from eff_adapters.llamafusion.files import load_modality_tower, save_pretrained
from eff_adapters.llamafusion.layout import pack
from eff_adapters.llamafusion.masks import modality_attention_mask, picture_blocks
from eff_adapters.llamafusion.routing import LowRankLinear, ModalityModule, Routing
from eff_adapters.llamafusion.sampling import generate, generate_image
from eff_adapters.llamafusion.schedule import add_noise, alphas_cumprod, ddim_step, sampling_times
from eff_adapters.llamafusion.tower import ModalityOutput, ModalityTower, add_modality_tower

__all__ = [
    "Context",
    "LowRankLinear",
    "ModalityModule",
    "ModalityOutput",
    "ModalityTower",
    "ModalityTowerConfig",
    "Routing",
    "add_modality_tower",
    "add_noise",
    "alphas_cumprod",
    "ddim_step",
    "generate",
    "generate_image",
    "load_modality_tower",
    "modality_attention_mask",
    "pack",
    "picture_blocks",
    "sampling_times",
    "save_pretrained",
]
