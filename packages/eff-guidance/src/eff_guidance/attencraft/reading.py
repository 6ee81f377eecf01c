"""What a model is given of a prompt, with gradients back to its words, and which token each column is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as a model reads it.

    Attributes:
        arguments: What the UNet's or transformer's forward gets of it, batch 1.
        tokens: Text of each column of the text.
    """

    arguments: Mapping[str, Any]
    tokens: tuple[str, ...]


Reader = Callable[[str], Reading]


def reader_of(pipe: Any, latents: Tensor) -> Reader:
    """How a pipeline of Stable Diffusion 1, 2, XL or 3 reads prompts; latents [1, C, H, W] tell the picture's size.

    Raises:
        ValueError: the pipeline is another one, for which a reader is to be given.
    """
    name = type(pipe).__name__
    for start, make in _READERS.items():
        if name.startswith(start):
            return make(pipe, latents)
    raise ValueError(
        f"no reader for {name}; pass reader=, a function from a prompt to Reading (built in: {', '.join(_READERS)})"
    )


def _ids(tokenizer: Any, prompt: str, length: int) -> tuple[str, ...]:
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
    return tuple(tokenizer.convert_ids_to_tokens(ids))


def _sd(pipe: Any, latents: Tensor) -> Reader:
    def read(prompt: str) -> Reading:
        states = pipe.encode_prompt(prompt, latents.device, 1, False)[0]
        return Reading({"encoder_hidden_states": states}, _ids(pipe.tokenizer, prompt, states.shape[1]))

    return read


def _sdxl(pipe: Any, latents: Tensor) -> Reader:
    side = [s * pipe.vae_scale_factor for s in latents.shape[-2:]]
    places = torch.tensor([[*side, 0, 0, *side]], dtype=latents.dtype, device=latents.device)

    def read(prompt: str) -> Reading:
        states, _, pooled, _ = pipe.encode_prompt(
            prompt, device=latents.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        more = {"text_embeds": pooled, "time_ids": places}
        arguments = {"encoder_hidden_states": states, "added_cond_kwargs": more}
        return Reading(arguments, _ids(pipe.tokenizer, prompt, states.shape[1]))

    return read


def _sd3(pipe: Any, latents: Tensor) -> Reader:
    def read(prompt: str) -> Reading:
        states, _, pooled, _ = pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        length = pipe.tokenizer_max_length
        tokens, rest = _ids(pipe.tokenizer, prompt, length), states.shape[1] - length
        behind = ("",) * rest if pipe.text_encoder_3 is None else _ids(pipe.tokenizer_3, prompt, rest)
        return Reading({"encoder_hidden_states": states, "pooled_projections": pooled}, tokens + behind)

    return read


_READERS: dict[str, Callable[[Any, Tensor], Reader]] = {
    "StableDiffusionXL": _sdxl,
    "StableDiffusion3": _sd3,
    "StableDiffusion": _sd,
}
