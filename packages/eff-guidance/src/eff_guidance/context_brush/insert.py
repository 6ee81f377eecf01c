"""The whole recipe: canvas, brush, blending, pasting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from eff_guidance.context_brush.apply import apply_incontext_brush
from eff_guidance.context_brush.blend import LatentBlendCallback
from eff_guidance.context_brush.canvas import Canvas, build_incontext_canvas, stitch
from eff_guidance.context_brush.config import ContextBrushConfig

if TYPE_CHECKING:
    from PIL import Image

_OURS = ("image", "mask_image", "masked_image_latents", "latents", "height", "width", "strength", "output_type")


@torch.no_grad()
def incontext_insert(
    pipe: Any,
    subject: Any,
    target: Image.Image,
    hole: Any,
    prompt: Any = None,
    *,
    config: ContextBrushConfig | None = None,
    canvas: Mapping[str, Any] | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    **pipe_kwargs: Any,
) -> list[Image.Image]:
    """Paint the subject into the hole of the target, without training.

    ``FluxFillPipeline`` is told the hole. Pipelines of SD3's class and FluxPipeline are not: there blending alone keeps
    the canvas, and ``config.blend`` must be on.

    Args:
        pipe: A pipeline of diffusers with an SD3 or FLUX transformer and a flow-matching scheduler.
        subject: The subject, see `build_incontext_canvas`.
        target: The picture to paint into.
        hole: Where to paint.
        prompt: What the result shows; or ``prompt_embeds`` and the like among ``pipe_kwargs``.
        config: Strengths and how to keep the rest.
        canvas: Further arguments of `build_incontext_canvas`, such as ``{"size": 512, "crop": 2.0}``.
        generator: Of the noise; one, or one a picture.
        pipe_kwargs: All other arguments of the pipeline's call.

    Returns:
        Pictures of the target's size; with ``config.feather=None`` the target's part of the canvas as decoded.

    Raises:
        ValueError: an argument that this function sets itself, or settings that keep nothing of the target.
        TypeError: the pipeline has no transformer of a known class.
    """
    config = ContextBrushConfig() if config is None else config
    if given := sorted(set(_OURS) & set(pipe_kwargs)):
        raise ValueError(f"{given} are set by incontext_insert: the canvas is what is generated, from noise alone")
    packed = type(pipe.transformer).__name__.startswith("Flux")
    fill = "mask_image" in _names(pipe)
    if not fill and not config.blend:
        raise ValueError(f"blend=False: {type(pipe).__name__} does not know the hole, so nothing would be kept")
    token = pipe.vae_scale_factor * (2 if packed else pipe.transformer.config.patch_size)
    laid = build_incontext_canvas(subject, target, hole, **{"token": token, **(canvas or {})})
    source = encode_canvas(pipe, laid, packed=packed)
    count = _count(prompt, pipe_kwargs)
    noise = _noise((count, *source.shape[1:]), generator, source)
    inside = token_mask(laid, token, packed=packed, cells=pipe.vae_scale_factor)
    call: dict[str, Any] = {**pipe_kwargs, "latents": noise, "height": laid.image.height, "width": laid.image.width}
    if fill:
        call |= {"image": laid.image, "mask_image": laid.mask}
    if config.blend:
        call["callback_on_step_end"] = LatentBlendCallback(
            source, noise, inside.to(source.device), then=pipe_kwargs.get("callback_on_step_end")
        )
        asked = pipe_kwargs.get("callback_on_step_end_tensor_inputs", [])
        call["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(["latents", *asked]))
    with apply_incontext_brush(pipe, laid.spans, config):
        images = pipe(prompt=prompt, generator=generator, output_type="pil", **call).images
    if config.feather is None:
        return [image.crop(laid.query_box) for image in images]
    return [stitch(laid, image, config.feather) for image in images]


def encode_canvas(pipe: Any, canvas: Canvas, *, packed: bool) -> Tensor:
    """Latents of the canvas as the pipeline's loop has them, [1, ...]: the mean of the autoencoder's distribution."""
    vae = pipe.vae
    points = torch.from_numpy(np.array(canvas.image)).permute(2, 0, 1)[None]
    points = (points.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    latents = vae.encode(points).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return pack(latents.to(pipe.transformer.dtype)) if packed else latents.to(pipe.transformer.dtype)


def token_mask(canvas: Canvas, token: int, *, packed: bool, cells: int) -> Tensor:
    """Tokens that hold any point of the hole, bool: [1, tokens, 1] packed, else [1, 1, h, w] in latents.

    Args:
        canvas: The canvas.
        token: Points along a side of a token.
        packed: Whether latents are packed.
        cells: Points along a side of a latent.
    """
    hole = torch.from_numpy(np.array(canvas.mask) > 0)[None, None]
    found = F.max_pool2d(hole.float(), token)
    if packed:
        return found.reshape(1, -1, 1) > 0
    return found.repeat_interleave(token // cells, 2).repeat_interleave(token // cells, 3) > 0


def pack(latents: Tensor) -> Tensor:
    """FLUX's packing of 2 x 2 latents to a token, [B, C, h, w] to [B, h w / 4, 4 C]."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _names(pipe: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(pipe).__call__).parameters)


def _count(prompt: Any, given: Mapping[str, Any]) -> int:
    embeds = given.get("prompt_embeds")
    each = len(prompt) if isinstance(prompt, list | tuple) else 1 if embeds is None else len(embeds)
    return each * given.get("num_images_per_prompt", 1)


def _noise(shape: tuple[int, ...], generator: Any, like: Tensor) -> Tensor:
    if isinstance(generator, list | tuple):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} pictures")
        return torch.cat([_noise((1, *shape[1:]), g, like) for g in generator])
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(like)
