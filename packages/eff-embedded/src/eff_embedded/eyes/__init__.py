"""SmolLM2 with eyes: a LLaVA-class model of the packages' SmolLM2 and ViT, with a connector and LoRA of our own.

LoRA acts only from a sequence's first picture on: text alone gets SmolLM2's answers bit for bit.
"""

from eff_embedded.eyes.encoder import PictureEncoder
from eff_embedded.eyes.load import SMOLLM2_EYES, checkpoint_file, load_processor, load_smollm2_eyes, read_checkpoint
from eff_embedded.eyes.parts import PICTURE_TOKEN, PICTURE_TOKEN_ID, EyesConfig
from eff_embedded.eyes.prompt import pixels, prompt

__all__ = [
    "PICTURE_TOKEN",
    "PICTURE_TOKEN_ID",
    "SMOLLM2_EYES",
    "EyesConfig",
    "PictureEncoder",
    "checkpoint_file",
    "load_processor",
    "load_smollm2_eyes",
    "pixels",
    "prompt",
    "read_checkpoint",
]
