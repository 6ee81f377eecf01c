"""What SmolLM2 with eyes reads: pictures as pixels, and chats in which a picture stands before the text of its turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eff_embedded.eyes.parts import PICTURE_TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""The system message that SmolLM2's chat template puts first where a chat has none."""


def pixels(picture: Image | np.ndarray, size: int = 126) -> Tensor:
    """A picture as the ViT wants it: squeezed to a square, float32 [3, size, size], normalised by ImageNet's colours.

    Args:
        picture: A PIL picture of any mode, or uint8 [height, width, 3].
        size: Height and width of the result.
    """
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    if image.mode != "RGB":
        image = on_white(image)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(image, np.float32) / 255)
    return ((values - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()


def on_white(image: Image) -> Image:
    """A picture of any mode in RGB; what is transparent becomes white."""
    from PIL import Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    return image.convert("RGB")


def opening() -> str:
    """The prompt up to the first picture of a chat's first turn."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


def asking(question: str) -> str:
    """The prompt from behind the picture to where the answer begins."""
    return f"\n{question}<|im_end|>\n<|im_start|>assistant\n"


def prompt(question: str, picture_tokens: int) -> str:
    """The whole prompt of a question about one picture, each patch a `PICTURE_TOKEN`."""
    return opening() + PICTURE_TOKEN * picture_tokens + asking(question)


CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if loop.first and message['role'] != 'system' %}"
    "{{- '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] in ('image', 'image_url') %}{{- '" + PICTURE_TOKEN + "\n' }}"
    "{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""SmolLM2's chat template, word for word the same prompt for text, with a place for pictures."""
