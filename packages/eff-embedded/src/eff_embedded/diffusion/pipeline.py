"""Stable Diffusion 3's pipeline with SmolLM2 in the place of its three text encoders. Imports diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from eff_embedded.diffusion.prompts import LENGTH, Prompts, hidden_states, pack


class CollageDiffusionPipeline(StableDiffusion3Pipeline):  # type: ignore[misc]
    """Pictures of 128 x 128 points from prompts.

    Everything that StableDiffusion3Pipeline's loop offers works: callbacks, skip layer guidance, own latents and prompt
    embeddings, guidance hooks on the transformer.

    Args:
        vae: diffusers' AutoencoderKL.
        transformer: diffusers' SD3Transformer2DModel.
        scheduler: diffusers' FlowMatchEulerDiscreteScheduler.
        text_encoder: The first layers of SmolLM2; None if prompts come as embeddings only.
        tokenizer: SmolLM2's.
        prompt_mean: Mean of the hidden states, one number an entry.
        prompt_std: Their deviation.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - as diffusers declares it

    def __init__(
        self,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        text_encoder: Any,
        tokenizer: Any,
        # With a default, diffusers takes them for settings and not for components.
        prompt_mean: Sequence[float] = (),
        prompt_std: Sequence[float] = (),
    ) -> None:
        super(StableDiffusion3Pipeline, self).__init__()
        width = transformer.config.joint_attention_dim
        if len(prompt_mean) != width or len(prompt_std) != width:
            raise ValueError(
                f"prompt_mean and prompt_std need {width} numbers each, got {len(prompt_mean)} and {len(prompt_std)}"
            )
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(prompt_mean=list(prompt_mean), prompt_std=list(prompt_std))
        from diffusers.image_processor import VaeImageProcessor

        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.tokenizer_max_length = LENGTH
        self.default_sample_size = transformer.config.sample_size
        self.patch_size = transformer.config.patch_size

    def encode(self, prompts: str | Sequence[str]) -> Prompts:
        """What the transformer reads of prompts: tokens [n, 32, 576] and pooled [n, 576]; an empty one is all zeros.

        Raises:
            ValueError: the pipeline has no text encoder.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.text_encoder is None or self.tokenizer is None:
            if any(texts):
                raise ValueError("this pipeline has no text encoder; pass prompt_embeds and pooled_prompt_embeds")
            states = [torch.zeros(0)] * len(texts)
        else:
            states = hidden_states(self.text_encoder, self.tokenizer, texts)
        mean, std = (torch.tensor(self.config[key], device=self.device) for key in ("prompt_mean", "prompt_std"))
        return Prompts(*(value.to(self.transformer.dtype) for value in pack(states, mean, std)))

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: None = None,
        prompt_3: None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: None = None,
        negative_prompt_3: None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = LENGTH,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode prompts as `StableDiffusion3Pipeline.encode_prompt` does.

        Returns:
            Tokens of the prompts and of the negative prompts, and both pooled.

        Raises:
            ValueError: an argument is given that means something for SD3's own text encoders only.
        """
        other = {
            "prompt_2": prompt_2,
            "prompt_3": prompt_3,
            "negative_prompt_2": negative_prompt_2,
            "negative_prompt_3": negative_prompt_3,
            "clip_skip": clip_skip,
            "the scale of a LoRA on the text encoder": lora_scale,
        }
        if given := [name for name, value in other.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: there is one text encoder only, and it takes no such argument")
        if prompt_embeds is None or pooled_prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = self.encode(prompt if prompt is not None else "")
            prompt_embeds, pooled_prompt_embeds = _each(
                prompt_embeds, pooled_prompt_embeds, times=num_images_per_prompt
            )
        if negative_prompt_embeds is None or negative_pooled_prompt_embeds is None:
            count = len(prompt_embeds) // num_images_per_prompt
            negative = (
                [negative_prompt or ""] * count
                if negative_prompt is None or isinstance(negative_prompt, str)
                else negative_prompt
            )
            if len(negative) != count:
                raise ValueError(f"{len(negative)} negative prompts for {count} prompts")
            found = self.encode(negative)
            negative_prompt_embeds, negative_pooled_prompt_embeds = _each(*found, times=num_images_per_prompt)
        return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        seed: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        **options: Any,
    ) -> Any:
        """Make pictures.

        Args:
            prompt: One or several.
            seed: The picture number i is the one that ``seed + i`` gives alone. Instead of ``generator``.
            num_inference_steps: Evaluations of the transformer.
            guidance_scale: How far to go beyond the prediction without prompt; 1 is none.
            options: All further arguments of StableDiffusion3Pipeline, by name.

        Returns:
            ``images``, as PIL pictures unless ``output_type`` says otherwise.

        Raises:
            ValueError: both ``seed`` and ``generator``.
        """
        prompt = prompt if prompt is None or isinstance(prompt, str) else list(prompt)
        if seed is not None:
            if options.get("generator") is not None:
                raise ValueError("pass seed or generator, not both")
            embeds = options.get("prompt_embeds")
            each = options.get("num_images_per_prompt", 1)
            count = each * len(prompt) if isinstance(prompt, list) else each if embeds is None else each * len(embeds)
            options["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        return super().__call__(
            prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **options
        )


def _each(tokens: Tensor, pooled: Tensor, *, times: int) -> tuple[Tensor, Tensor]:
    return tokens.repeat_interleave(times, 0), pooled.repeat_interleave(times, 0)
