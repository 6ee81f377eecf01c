"""The three passes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff_attention.contrastive_focus.config import CarveConfig
from eff_attention.contrastive_focus.contrast import contrast_attention, fuse_attention
from eff_attention.contrastive_focus.record import ImageAttention, record_image_attentions
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
    """`carve_answers` to one question about one picture."""
    return carve_answers(model, processor, [picture], [question], config, cache=cache)[0]


def carve_answers(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Any],
    questions: Sequence[str],
    config: CarveConfig | None = None,
    *,
    cache: PictureCache | None = None,
) -> list[CarveOutput]:
    """Answer a question about each picture, look where the question alone looks, and answer again.

    Each of the three passes is one batch of all prompts.

    Args:
        model: A vision-language model of transformers.
        processor: Its processor, with a chat template.
        pictures: PIL pictures.
        questions: One about each.
        config: Settings.
        cache: Remembers the general pass of each picture; keyed by the picture's pixels and the settings.

    Raises:
        ValueError: there are not as many questions as pictures, or none.
    """
    c = config or CarveConfig()
    if not pictures or len(pictures) != len(questions):
        raise ValueError(f"wanted one question for each picture, got {len(questions)} for {len(pictures)}")
    generals = _general(model, processor, pictures, c, cache)
    asked = record_image_attentions(
        model,
        prompts(processor, [[p] for p in pictures], [q + c.suffix for q in questions]),
        c.layers,
        max_new_tokens=c.max_new_tokens,
    )
    looks = [_look(*each, c) for each in zip(pictures, asked, generals, strict=True)]
    shown = [
        [refined] if c.final == "refined" else [picture, refined]
        for picture, (_, _, _, refined) in zip(pictures, looks, strict=True)
    ]
    inputs = prompts(processor, shown, [q + c.suffix for q in questions])
    generate: Any = model.generate
    with torch.no_grad():
        out = generate(**inputs, max_new_tokens=c.max_new_tokens, do_sample=False, num_beams=1)
    new = out[:, inputs["input_ids"].size(1) :]
    return [
        CarveOutput(_text(processor, own.ids), _text(processor, ids), score, mask, crop, refined)
        for own, ids, (score, mask, crop, refined) in zip(asked, new, looks, strict=True)
    ]


def _general(
    model: nn.Module, processor: Any, pictures: Sequence[Any], c: CarveConfig, cache: PictureCache | None
) -> list[ImageAttention]:
    """Attention under the general request, for the pictures that are not in the cache."""
    keys = [(p.size, p.mode, p.tobytes(), c, id(model)) for p in pictures]
    known = {key: found for key in keys if cache is not None and (found := cache.get(key)) is not None}
    missing = {key: p for key, p in zip(keys, pictures, strict=True) if key not in known}
    if missing:
        inputs = prompts(processor, [[p] for p in missing.values()], [c.general + c.suffix] * len(missing))
        new = record_image_attentions(model, inputs, c.layers, max_new_tokens=c.max_new_tokens)
        for key, value in zip(missing, new, strict=True):
            known[key] = value
            if cache is not None:
                cache.put(key, value)
    return [known[key] for key in keys]


def _look(
    picture: Any, asked: ImageAttention, general: ImageAttention, c: CarveConfig
) -> tuple[Tensor, Tensor, tuple[int, int, int, int], Any]:
    """Score, mask, crop and refined picture."""
    if asked.grid != general.grid:
        raise ValueError(f"the picture has a grid of {asked.grid} under the question and {general.grid} in general")
    contrast = contrast_attention(asked.maps, general.maps, c.lam)
    score = fuse_attention(contrast, asked.grid, (picture.height, picture.width), time=c.time)
    mask = attention_regions(score, c.top_p, c.max_regions, rank=c.rank)
    refined, crop = mask_crop_resize(picture, mask, keep_outside=c.outside == "kept", keep_ratio=c.ratio == "picture")
    return score, mask, crop, refined


def prompts(processor: Any, pictures: Sequence[Sequence[Any]], texts: Sequence[str]) -> Mapping[str, Any]:
    """Inputs for one user turn each of pictures and a text; several are padded on the left."""
    written = []
    for some, text in zip(pictures, texts, strict=True):
        content = [*({"type": "image"} for _ in some), {"type": "text", "text": text}]
        written.append(
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        )
    several = {} if len(written) == 1 else {"padding": True, "padding_side": "left"}
    images: Any = list(pictures[0]) if len(written) == 1 else [list(some) for some in pictures]
    result: Mapping[str, Any] = processor(
        images=images, text=written[0] if len(written) == 1 else written, return_tensors="pt", **several
    )
    return result


def _text(processor: Any, ids: Tensor) -> str:
    return str(processor.decode(ids, skip_special_tokens=True)).strip()
