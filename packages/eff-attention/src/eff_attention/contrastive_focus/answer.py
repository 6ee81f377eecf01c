"""The three passes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff_attention.contrastive_focus.config import CarveConfig
from eff_attention.contrastive_focus.contrast import contrast_attention, fuse_attention
from eff_attention.contrastive_focus.record import ImageAttention, record_image_attention
from eff_attention.contrastive_focus.regions import attention_regions, mask_crop_resize


@dataclass(frozen=True, slots=True)
class CarveOutput:
    """What came out.

    Attributes:
        original_answer: The answer to the question about the picture alone.
        answer: The answer after the second look.
        score: Score of each pixel [H, W].
        mask: What was kept, bool [H, W].
        crop: (left, top, right, bottom) in the picture, right and bottom exclusive.
        refined: The refined picture.
    """

    original_answer: str
    answer: str
    score: Tensor
    mask: Tensor
    crop: tuple[int, int, int, int]
    refined: Any


class PictureCache:
    """The general pass of pictures that were already looked at, so that further questions about one cost two passes.

    Args:
        size: Most pictures to remember; the oldest goes first.
    """

    def __init__(self, size: int = 32) -> None:
        if size < 1:
            raise ValueError(f"size must be 1 or more, got {size}")
        self.size = size
        self._kept: dict[tuple[object, ...], ImageAttention] = {}

    def get(self, key: tuple[object, ...]) -> ImageAttention | None:
        """What is remembered under a key."""
        return self._kept.get(key)

    def put(self, key: tuple[object, ...], value: ImageAttention) -> None:
        """Remember."""
        if len(self._kept) >= self.size:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = value


def carve_answer(
    model: nn.Module,
    processor: Any,
    picture: Any,
    question: str,
    config: CarveConfig | None = None,
    *,
    cache: PictureCache | None = None,
) -> CarveOutput:
    """Answer a question about a picture, look where the question alone looks, and answer again.

    Args:
        model: A vision-language model of transformers.
        processor: Its processor, with a chat template.
        picture: A PIL picture.
        question: The question.
        config: Settings.
        cache: Remembers the general pass of each picture; keyed by the picture's pixels and the settings.
    """
    c = config or CarveConfig()
    key = (picture.size, picture.mode, picture.tobytes(), c, id(model))
    general = cache.get(key) if cache is not None else None
    if general is None:
        general = record_image_attention(
            model, prompt(processor, [picture], c.general + c.suffix), c.layers, max_new_tokens=c.max_new_tokens
        )
        if cache is not None:
            cache.put(key, general)
    asked = record_image_attention(
        model, prompt(processor, [picture], question + c.suffix), c.layers, max_new_tokens=c.max_new_tokens
    )
    if asked.grid != general.grid:
        raise ValueError(f"the picture has a grid of {asked.grid} under the question and {general.grid} in general")
    contrast = contrast_attention(asked.maps, general.maps, c.lam)
    score = fuse_attention(contrast, asked.grid, (picture.height, picture.width), time=c.time)
    mask = attention_regions(score, c.top_p, c.max_regions, rank=c.rank)
    refined, crop = mask_crop_resize(picture, mask)
    shown = [refined] if c.final == "refined" else [picture, refined]
    inputs = prompt(processor, shown, question + c.suffix)
    generate: Any = model.generate
    with torch.no_grad():
        out = generate(**inputs, max_new_tokens=c.max_new_tokens, do_sample=False, num_beams=1)
    new = out[:, inputs["input_ids"].size(1) :]
    return CarveOutput(_text(processor, asked.ids), _text(processor, new[0]), score, mask, crop, refined)


def prompt(processor: Any, pictures: list[Any], text: str) -> Mapping[str, Any]:
    """Inputs for one user turn of pictures and a text."""
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    written = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    result: Mapping[str, Any] = processor(images=pictures, text=written, return_tensors="pt")
    return result


def _text(processor: Any, ids: Tensor) -> str:
    return str(processor.decode(ids, skip_special_tokens=True)).strip()
