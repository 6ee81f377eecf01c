"""Loading collage diffusion from its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from eff_embedded.diffusion.pipeline import CollageDiffusionPipeline

VAE = "collage-vae-v1"
TRANSFORMER = "collage-diffusion-v1"


def load_collage_diffusion(
    name: str = TRANSFORMER, *, dtype: torch.dtype = torch.float32, text_encoder: bool = True
) -> CollageDiffusionPipeline:
    """The trained text-to-picture model of this package, as a pipeline of diffusers.

    Args:
        name: Checkpoint of the transformer.
        dtype: Of all its parts in memory; the files hold float16.
        text_encoder: Whether to load SmolLM2's first layers; without, prompts must come as embeddings.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from eff_embedded.checkpoints import checkpoint

    found = checkpoint(name)
    transformer = SD3Transformer2DModel.from_pretrained(found.folder, torch_dtype=dtype)
    vae = AutoencoderKL.from_pretrained(checkpoint(VAE).folder, torch_dtype=dtype)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(found.folder)
    scale = found.weights("prompts.safetensors")
    pipe = collage_pipeline(transformer, vae, scheduler, scale["mean"], scale["std"], text_encoder=text_encoder)
    return pipe.to(dtype)


def collage_pipeline(
    transformer: Any, vae: Any, scheduler: Any, mean: Tensor, std: Tensor, *, text_encoder: bool = True
) -> CollageDiffusionPipeline:
    """The pipeline around a transformer and an autoencoder.

    Args:
        transformer: diffusers' SD3Transformer2DModel that reads SmolLM2's states.
        vae: diffusers' AutoencoderKL.
        scheduler: diffusers' FlowMatchEulerDiscreteScheduler with the shift of the training.
        mean: Mean of the states that the transformer was trained on, [576].
        std: Their deviation, [576].
        text_encoder: Whether to load SmolLM2's first layers.
    """
    from eff_embedded.diffusion.pipeline import CollageDiffusionPipeline
    from eff_embedded.diffusion.prompts import load_text_encoder

    model, tokenizer = load_text_encoder() if text_encoder else (None, None)
    pipe = CollageDiffusionPipeline(
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
        text_encoder=model,
        tokenizer=tokenizer,
        prompt_mean=mean.float().tolist(),
        prompt_std=std.float().tolist(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
