"""Pictures as latents and prompts as hidden states, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_VERSION = 2  # raise it when what is written changes
_AT_ONCE = 256


def prompts(count: int, first_seed: int) -> dict[str, Tensor]:
    """Hidden states of the prompts of ``count`` examples.

    Returns:
        ``states`` bfloat16 [tokens of all prompts, width]; ``ends`` int64 [count], where each prompt's end; ``mean``
        and ``std`` [width] over all tokens but the first of each prompt.
    """
    from eff_embedded.cache import cached

    return _read(cached(f"collage-prompts-{count}-{first_seed}-v{_VERSION}", partial(_prompts, count, first_seed)))


def latents(count: int, first_seed: int, vae: Path) -> Tensor:
    """Latents of the pictures of ``count`` examples, float16 [count, channels, h, w]."""
    from eff_embedded.cache import cached

    digest = hashlib.sha256((vae / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:12]
    name = f"collage-latents-{digest}-{count}-{first_seed}-v{_VERSION}"
    return _read(cached(name, partial(_latents, count, first_seed, vae)))["latents"]


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "data.safetensors")


def _prompts(count: int, first_seed: int, folder: Path) -> None:
    from eff_embedded.diffusion.prompts import hidden_states, load_text_encoder
    from eff_embedded.diffusion.world import example
    from safetensors.torch import save_file

    model, tokenizer = load_text_encoder(torch.bfloat16)
    states: list[Tensor] = []
    for seeds in torch.arange(first_seed, first_seed + count).split(_AT_ONCE):
        states += hidden_states(model, tokenizer, [example(seed).prompt for seed in seeds.tolist()])
    later = torch.cat([state[1:] for state in states]).float()
    data = {
        "states": torch.cat(states),
        "ends": torch.tensor([len(state) for state in states]).cumsum(0),
        "mean": later.mean(0),
        "std": later.std(0),
    }
    save_file(data, folder / "data.safetensors")


@torch.no_grad()
def _latents(count: int, first_seed: int, vae: Path, folder: Path) -> None:
    from diffusers import AutoencoderKL
    from eff_embedded.diffusion.world import example
    from safetensors.torch import save_file

    model: Any = AutoencoderKL.from_pretrained(vae).eval()
    found = []
    for seeds in torch.arange(first_seed, first_seed + count).split(16):
        pictures = torch.stack([example(seed).collage.tensor() * 2 - 1 for seed in seeds.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            made = model.encode(pictures).latent_dist.mean
        found.append(((made.float() - model.config.shift_factor) * model.config.scaling_factor).half())
    save_file({"latents": torch.cat(found)}, folder / "data.safetensors")
