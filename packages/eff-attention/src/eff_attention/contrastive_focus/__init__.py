"""Look again at the right place: attention to a picture under the question over attention under a general request.

CARVE: Focusing by Contrastive Attention (arXiv 2509.06461). No training; any vision-language model of transformers
whose attention `eff_kernels.edit.attention` reaches.
"""

from eff_attention.contrastive_focus.answer import CarveOutput, PictureCache, carve_answer, carve_answers
from eff_attention.contrastive_focus.complexity import attention_entropy, colour_complexity, texture_complexity
from eff_attention.contrastive_focus.config import CarveConfig
from eff_attention.contrastive_focus.contrast import contrast_attention, fuse_attention
from eff_attention.contrastive_focus.record import ImageAttention, record_image_attention, record_image_attentions
from eff_attention.contrastive_focus.regions import attention_regions, mask_crop_resize

__all__ = [
    "CarveConfig",
    "CarveOutput",
    "ImageAttention",
    "PictureCache",
    "attention_entropy",
    "attention_regions",
    "carve_answer",
    "carve_answers",
    "colour_complexity",
    "contrast_attention",
    "fuse_attention",
    "mask_crop_resize",
    "record_image_attention",
    "record_image_attentions",
    "texture_complexity",
]
