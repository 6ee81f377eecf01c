"""The pipeline on the trained model: diffusers' classes, shapes, seeds, batches, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from eff_embedded.checkpoints import MAX_BYTES, checkpoint
from eff_embedded.diffusion import TRANSFORMER, VAE, example, load_collage_diffusion

PROMPTS = ["A dog is left of an apple.", "a car on a blue background", ""]


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The pipeline, loaded once."""
    return load_collage_diffusion()


def _few(pipe: Any, prompt: Any, **options: Any) -> torch.Tensor:
    made: torch.Tensor = pipe(prompt, num_inference_steps=2, output_type="pt", **options).images
    return made


def test_parts_are_diffusers_own_and_small(pipe: Any) -> None:
    """SD3's transformer and AutoencoderKL, each from a folder of at most ten million bytes."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    assert type(pipe.transformer) is SD3Transformer2DModel
    assert type(pipe.vae) is AutoencoderKL
    assert isinstance(pipe, StableDiffusion3Pipeline)
    for name in (TRANSFORMER, VAE):
        assert sum(file.stat().st_size for file in checkpoint(name).folder.iterdir()) <= MAX_BYTES


def test_classes_load_the_folders_alone() -> None:
    """No loader of ours is needed for the two networks."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    made = SD3Transformer2DModel.from_pretrained(checkpoint(TRANSFORMER).folder)
    assert made.config.num_layers == len(made.transformer_blocks) == 8
    assert AutoencoderKL.from_pretrained(checkpoint(VAE).folder).config.latent_channels == 4


def test_autoencoder_gives_pictures_back(pipe: Any) -> None:
    """At least 30 dB on collages that it has not seen; latents have a deviation near 1 in each channel."""
    pictures = torch.stack([example(10**7 + i).collage.tensor() for i in range(24)]) * 2 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latent_dist.mean
        made = pipe.vae.decode(latents).sample.clamp(-1, 1)
    error = ((made - pictures) / 2).square().mean((1, 2, 3))
    assert (-10 * error.log10()).mean() > 30
    assert latents.shape == (24, 4, 32, 32)
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.3


def test_prompts_are_encoded_one_by_one(pipe: Any) -> None:
    """Padding is zero, the empty prompt is zero, and company changes nothing."""
    tokens, pooled = pipe.encode(PROMPTS)
    assert tokens.shape == (3, 32, 576)
    assert pooled.shape == (3, 576)
    assert not tokens[2].any()
    assert not pooled[2].any()
    length = len(pipe.tokenizer(PROMPTS[1]).input_ids)
    assert tokens[1, :length].any(-1).all()
    assert not tokens[1, length:].any()
    alone, pooled_alone = pipe.encode(PROMPTS[1])
    torch.testing.assert_close(alone[0], tokens[1], rtol=0, atol=2e-5)
    torch.testing.assert_close(pooled_alone[0], pooled[1], rtol=0, atol=2e-5)


def test_seed_decides(pipe: Any) -> None:
    """The same seed gives the same bits; another seed and another prompt do not."""
    first = _few(pipe, PROMPTS[0], seed=3)
    assert first.shape == (1, 3, 128, 128)
    assert torch.equal(first, _few(pipe, PROMPTS[0], seed=3))
    assert not torch.equal(first, _few(pipe, PROMPTS[0], seed=4))
    assert not torch.equal(first, _few(pipe, PROMPTS[1], seed=3))


def test_batch_equals_single(pipe: Any) -> None:
    """Picture number i of a batch is what seed + i gives alone, up to the order of sums."""
    batch = _few(pipe, PROMPTS[:2], seed=3)
    for i, prompt in enumerate(PROMPTS[:2]):
        torch.testing.assert_close(batch[i : i + 1], _few(pipe, prompt, seed=3 + i), rtol=0, atol=1e-4)
    several = _few(pipe, PROMPTS[0], seed=3, num_images_per_prompt=2)
    torch.testing.assert_close(several[:1], batch[:1], rtol=0, atol=1e-4)
    assert not torch.equal(several[0], several[1])


def test_guidance_by_hand(pipe: Any) -> None:
    """One step of the pipeline is the formula: v = v0 + g (v1 - v0), then latents - v x (1 - 0)."""
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    got = pipe(PROMPTS[0], latents=noise, num_inference_steps=1, guidance_scale=3.0, output_type="latent").images
    tokens, pooled = pipe.encode([PROMPTS[0], ""])
    with torch.no_grad():
        asked, empty = pipe.transformer(noise.repeat(2, 1, 1, 1), tokens, pooled, torch.tensor([1000.0] * 2)).sample
    torch.testing.assert_close(got[0], noise[0] - (empty + 3 * (asked - empty)), rtol=0, atol=1e-4)


def test_callbacks_and_embeddings(pipe: Any) -> None:
    """Steps are told, and embeddings take the place of prompts."""
    steps: list[int] = []

    def watch(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return values

    tokens, pooled = pipe.encode(PROMPTS[0])
    told = _few(pipe, None, prompt_embeds=tokens, pooled_prompt_embeds=pooled, seed=3, callback_on_step_end=watch)
    assert steps == [0, 1]
    assert torch.equal(told, _few(pipe, PROMPTS[0], seed=3))


def test_negative_prompt_counts(pipe: Any) -> None:
    """It changes the picture, and the empty one is the default."""
    plain = _few(pipe, PROMPTS[0], seed=3)
    assert torch.equal(plain, _few(pipe, PROMPTS[0], seed=3, negative_prompt=""))
    assert not torch.equal(plain, _few(pipe, PROMPTS[0], seed=3, negative_prompt="a cat"))


def test_refusals(pipe: Any) -> None:
    """What SD3's other encoders would take is refused by name."""
    with pytest.raises(ValueError, match="prompt_2"):
        _few(pipe, PROMPTS[0], prompt_2="a cat")
    with pytest.raises(ValueError, match="clip_skip"):
        _few(pipe, PROMPTS[0], clip_skip=1)
    with pytest.raises(ValueError, match="seed or generator"):
        _few(pipe, PROMPTS[0], seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="1 negative prompts for 2"):
        _few(pipe, PROMPTS[:2], negative_prompt=["a cat"])
    with pytest.raises(TypeError, match="strength"):
        _few(pipe, PROMPTS[0], strength=1)


def test_long_prompts_are_cut_with_a_warning(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    """And give what the first 32 tokens give."""
    long = "a dog and " * 20 + "a cat"
    tokens, _ = pipe.encode(long)
    assert "cut to 32" in caplog.text
    torch.testing.assert_close(tokens, pipe.encode("a dog and " * 20 + "a car").tokens, rtol=0, atol=2e-5)


def test_save_and_load_as_diffusers_does(pipe: Any, tmp_path: Path) -> None:
    """save_pretrained and from_pretrained give the same pictures."""
    from eff_embedded.diffusion.pipeline import CollageDiffusionPipeline

    pipe.save_pretrained(tmp_path)
    again = CollageDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(_few(again, PROMPTS[0], seed=3), _few(pipe, PROMPTS[0], seed=3))


def test_without_text_encoder() -> None:
    """Embeddings work, prompts are refused with the way out."""
    bare = load_collage_diffusion(text_encoder=False)
    assert (
        _few(bare, None, prompt_embeds=torch.zeros(1, 32, 576), pooled_prompt_embeds=torch.zeros(1, 576))
        .isfinite()
        .all()
    )
    with pytest.raises(ValueError, match="prompt_embeds"):
        _few(bare, PROMPTS[0])
