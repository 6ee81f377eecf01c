"""Pictures and expressions as the transformers of FLUX, SD3 and their kin read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eff_guidance.refam.config import RefAMConfig
from eff_guidance.refam.prompt import MagnetPrompt, TokenRole, add_magnets

PIPELINES = ("FluxPipeline", "StableDiffusion3Pipeline")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """An expression as a transformer reads it.

    Attributes:
        embeds: States of its tokens, [1, T, C].
        pooled: Pooled state of the plain expression, [1, P].
        tokens: Text of each token, T of them.
        role: What each token is there for; see `MagnetPrompt`.
    """

    embeds: Tensor
    pooled: Tensor
    tokens: tuple[str, ...]
    role: tuple[TokenRole, ...]

    def __post_init__(self) -> None:
        count = self.embeds.shape[1]
        if self.embeds.dim() != 3 or len(self.embeds) != 1 or len(self.tokens) != count or len(self.role) != count:
            raise ValueError(
                f"embeds {list(self.embeds.shape)} with {len(self.tokens)} tokens and {len(self.role)} roles; "
                "wanted [1, T, C] and T of each"
            )

    @property
    def valid(self) -> Tensor:
        """Which tokens are no padding, bool [T]."""
        return torch.tensor([role != "pad" for role in self.role])


def kind_of(pipe: Any) -> str:
    """Which transformer a pipeline has, "flux" or "sd3".

    Raises:
        ValueError: the pipeline has another one.
    """
    name = type(getattr(pipe, "transformer", None)).__name__
    kinds = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}
    if name not in kinds:
        raise ValueError(
            f"{type(pipe).__name__} has no transformer that can point; use {', '.join(PIPELINES)} or another pipeline "
            f"around {' or '.join(kinds)}"
        )
    return kinds[name]


@torch.no_grad()
def encode_expression(pipe: Any, expression: str, config: RefAMConfig) -> EncodedPrompt:
    """Encode an expression with magnets by a pipeline's own text encoders.

    FLUX: T5 reads ids with magnets, CLIP the plain expression. SD3: CLIP reads magnets as text, T5 as ids; the pooled
    state is that of the plain expression. Pipelines with one text encoder and `encode_prompt` (as collage diffusion)
    read text.

    Raises:
        ValueError: there is no text encoder, the text is too long, or ``separate_eos`` cannot be had.
    """
    if kind_of(pipe) == "flux":
        return _flux(pipe, expression, config)
    return _sd3(pipe, expression, config) if hasattr(pipe, "text_encoder_3") else _plain(pipe, expression, config)


def _prompt(tokenizer: Any, expression: str, config: RefAMConfig, *, apart: bool, length: int) -> MagnetPrompt:
    return add_magnets(
        tokenizer, expression, config.magnets, separate_eos=apart, context=config.context,
        only_noun_phrase=config.noun_phrase, max_length=length, pad=True,
    )  # fmt: skip


def _needed(pipe: Any, *names: str) -> None:
    if lacking := [n for n in names if getattr(pipe, n, None) is None]:
        raise ValueError(
            f"{type(pipe).__name__} has no {', '.join(lacking)}; encode the expression elsewhere and pass prompt="
        )


def _flux(pipe: Any, expression: str, config: RefAMConfig) -> EncodedPrompt:
    _needed(pipe, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    apart = config.separate_eos is not False
    found = _prompt(pipe.tokenizer_2, expression, config, apart=apart, length=512)
    device = pipe._execution_device
    embeds = pipe.text_encoder_2(found.input_ids[None].to(device))[0]
    ids = pipe.tokenizer(
        expression, padding="max_length", max_length=pipe.tokenizer_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    pooled = pipe.text_encoder(ids.to(device)).pooler_output
    return EncodedPrompt(embeds, pooled, found.tokens, found.role)


def _sd3(pipe: Any, expression: str, config: RefAMConfig) -> EncodedPrompt:
    _needed(pipe, "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    length = pipe.tokenizer_max_length
    clip = _prompt(pipe.tokenizer, expression, config, apart=False, length=length)
    states = pipe.encode_prompt(clip.text, None, None, do_classifier_free_guidance=False)[0]
    pooled = pipe.encode_prompt(expression, None, None, do_classifier_free_guidance=False)[2]
    rest = states.shape[1] - length
    if pipe.text_encoder_3 is None:
        return EncodedPrompt(states, pooled, clip.tokens + ("",) * rest, clip.role + ("pad",) * rest)
    t5 = _prompt(pipe.tokenizer_3, expression, config, apart=config.separate_eos is not False, length=rest)
    behind = pipe.text_encoder_3(t5.input_ids[None].to(pipe._execution_device))[0].to(states)
    return EncodedPrompt(
        torch.cat([states[:, :length], behind], 1), pooled, clip.tokens + t5.tokens, clip.role + t5.role
    )


def _plain(pipe: Any, expression: str, config: RefAMConfig) -> EncodedPrompt:
    _needed(pipe, "text_encoder", "tokenizer")
    if config.separate_eos:
        raise ValueError(f"separate_eos=True, but the text encoder of {type(pipe).__name__} is given text, not ids")
    states, _, pooled, _ = pipe.encode_prompt(expression)
    found = _prompt(pipe.tokenizer, expression, config, apart=False, length=states.shape[1])
    if found.text != expression:
        states = pipe.encode_prompt(found.text)[0]
    return EncodedPrompt(states, pooled, found.tokens, found.role)


@torch.no_grad()
def encode_picture(pipe: Any, image: Any, size: int | None) -> tuple[Tensor, tuple[int, int]]:
    """Latents [1, C, h, w] of a picture, float32, and its grid of patches.

    Args:
        pipe: The pipeline.
        image: A PIL picture or a tensor [3, H, W] from 0 to 1.
        size: Longer side in points that it is scaled to, rounded to whole patches; None for the pipeline's own.

    Raises:
        ValueError: the tensor has another shape.
    """
    patch = 2 if kind_of(pipe) == "flux" else pipe.transformer.config.patch_size
    unit = pipe.vae_scale_factor * patch
    height, width = size_of(image)
    longest = size or pipe.default_sample_size * pipe.vae_scale_factor
    scale = longest / max(height, width)
    rows, columns = (max(1, round(side * scale / unit)) for side in (height, width))
    pixels = pipe.image_processor.preprocess(
        image[None] if isinstance(image, Tensor) else image.convert("RGB"), height=rows * unit, width=columns * unit
    )
    vae = pipe.vae
    z = vae.encode(pixels.to(pipe._execution_device, vae.dtype)).latent_dist.mode().float()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (z - shift) * vae.config.scaling_factor, (rows, columns)


def size_of(image: Any) -> tuple[int, int]:
    """Height and width of a PIL picture or a tensor [3, H, W].

    Raises:
        ValueError: the tensor has another shape.
    """
    if not isinstance(image, Tensor):
        return image.height, image.width
    if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(f"a picture {image.dtype} {list(image.shape)}; wanted floats [3, H, W] from 0 to 1")
    return image.shape[1], image.shape[2]


def run_transformer(pipe: Any, latents: Tensor, grid: tuple[int, int], prompt: EncodedPrompt, time: float) -> Tensor:
    """One evaluation of a pipeline's transformer.

    Args:
        pipe: The pipeline.
        latents: With noise, [1, C, h, w].
        grid: Rows and columns of patches.
        prompt: The expression.
        time: 0 for a picture, 1 for noise.
    """
    model = pipe.transformer
    like = {"device": latents.device, "dtype": model.dtype}
    given = {
        "encoder_hidden_states": prompt.embeds.to(**like), "pooled_projections": prompt.pooled.to(**like),
        "return_dict": False,
    }  # fmt: skip
    if kind_of(pipe) == "sd3":
        moment = torch.full((1,), 1000 * time, device=latents.device)
        return model(hidden_states=latents.to(model.dtype), timestep=moment, **given)[0]
    rows, columns = grid
    packed = latents.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # [1, C, rows, 2, columns, 2]
    packed = packed.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    places = torch.zeros(rows, columns, 3)
    places[..., 1], places[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    if model.config.guidance_embeds:
        given["guidance"] = torch.full((1,), 3.5, device=latents.device)
    return model(
        hidden_states=packed.to(model.dtype), timestep=torch.full((1,), time, **like),
        img_ids=places.reshape(-1, 3).to(**like), txt_ids=torch.zeros(prompt.embeds.shape[1], 3, **like), **given,
    )[0]  # fmt: skip
