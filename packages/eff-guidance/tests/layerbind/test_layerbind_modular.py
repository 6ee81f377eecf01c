"""Blocks of modular pipelines against ordinary pipelines with the same layout."""

import warnings

import pytest
import torch
from eff_guidance.head_guidance import SoftPAGConfig, apply_head_guidance
from eff_guidance.layerbind import Layer, LayerBindConfig, Layout, apply_layerbind, layerbind_blocks

CHARACTERS = "abcdefghijklmnopqrstuvwxyz"
CONFIG = LayerBindConfig(eta1=0.5, hard_blocks=(1,))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def clip(*, projected):
    """CLIP's tokenizer with letters alone, and a tiny encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32 if not projected else 16, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=32, bos_token_id=tokenizer.bos_token_id, max_position_embeddings=77,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5():
    """T5's tokenizer with letters alone, and a tiny encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in CHARACTERS)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    return tokenizer, T5EncoderModel(config).eval()


def text_parts(kind):
    torch.manual_seed(0)
    three, encoder = t5()
    if kind == "flux":
        one, first = clip(projected=False)
        return {"tokenizer": one, "text_encoder": first, "tokenizer_2": three, "text_encoder_2": encoder}
    (one, first), (two, second) = clip(projected=True), clip(projected=True)
    return {
        "tokenizer": one, "text_encoder": first, "tokenizer_2": two, "text_encoder_2": second, "tokenizer_3": three,
        "text_encoder_3": encoder,
    }  # fmt: skip


def whole(kind, blocks, parts):
    pipe = blocks.init_pipeline()
    pipe.update_components(**{n: c for n, c in parts.items() if n in pipe.components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def auto_blocks(kind):
    if kind == "flux":
        from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks

        return FluxAutoBlocks()
    from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
        StableDiffusion3AutoBlocks,
    )

    return StableDiffusion3AutoBlocks()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_from_words_to_latents(tiny, scene, kind):
    """The whole tree of blocks, which encodes the layout by itself, draws what the ordinary pipeline draws."""
    pipe = tiny.pipeline(kind)
    pipe.register_modules(**text_parts(kind))
    layout = Layout(
        background="a meadow",
        layers=(
            Layer(prompt="a bee", box=(0.25, 0.25, 0.75, 0.75), negative="a cow" if kind == "sd3" else None),
            Layer(prompt="a mouse", box=(0.5, 0.5, 1, 1)),
        ),
    )
    call = {"prompt": "a bee on a mouse", "max_sequence_length": 9, "num_inference_steps": 4}
    size = {"height": tiny.size, "width": tiny.size}
    from eff_guidance.layerbind import encode_layout

    prompts = encode_layout(pipe, layout, max_sequence_length=9)
    more = {"guidance_scale": 4.0, "negative_prompt": "a cat"} if kind == "sd3" else {}
    with apply_layerbind(pipe, layout, CONFIG, prompts=prompts):
        wanted = pipe(**call, **size, **more, generator=torch.Generator().manual_seed(3), output_type="latent").images
    modular = whole(kind, layerbind_blocks(auto_blocks(kind)), pipe.components)
    if kind == "sd3":
        from diffusers.guiders import ClassifierFreeGuidance

        modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0))
        call["negative_prompt"] = "a cat"

    def draw(**layers):
        return modular(**call, **size, **layers, generator=torch.Generator().manual_seed(3), output="latents")

    found = draw(layout=layout, layout_config=CONFIG)
    if kind == "flux":  # the modular pipeline gives its latents unpacked
        wanted = pipe._unpack_latents(wanted, tiny.size, tiny.size, pipe.vae_scale_factor)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    plain = draw()
    assert not torch.allclose(plain, found, rtol=1e-2)
    assert torch.equal(draw(layout=layout, layout_config=LayerBindConfig(eta1=0.0, eta2=0.0)), plain)
    assert "forward" not in vars(pipe.transformer)


def denoise(pipe, **parts):
    from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

    return whole("sd3", layerbind_blocks(StableDiffusion3DenoiseStep()), {**pipe.components, **parts})


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_guided_by_heads_too(tiny, scene, guidance_scale):
    from eff_guidance.head_guidance import SoftPAGGuidance

    pipe = tiny.pipeline("sd3")
    given, prompts = tiny.prompts(pipe), scene.prompts(pipe)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    heads = {"heads": ((0, 1), (2, 0)), "scale": 2.0, "strength": 0.7}
    call = {"height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 4}
    with (
        apply_layerbind(pipe, scene.layout, CONFIG, prompts=prompts, order=1),
        apply_head_guidance(pipe, SoftPAGConfig(**heads), order=0),
    ):
        wanted = pipe(**given, latents=start, guidance_scale=guidance_scale, **call).images
    blocks = denoise(pipe, guider=SoftPAGGuidance(guidance_scale=guidance_scale, **heads))
    for _ in range(2):  # nothing of the first run is in the way of the second
        pipe.scheduler.set_timesteps(4)
        found = blocks(
            **given, latents=start, timesteps=pipe.scheduler.timesteps, num_inference_steps=4, output="latents",
            layout=scene.layout, layout_config=CONFIG, layout_prompts=prompts,
        )  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert "forward" not in vars(pipe.transformer)


def test_what_layers_cannot_follow_is_refused(tiny, scene):
    from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
    from diffusers.modular_pipelines.stable_diffusion_3.decoders import StableDiffusion3DecodeStep
    from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

    pipe = tiny.pipeline("sd3")
    pipe.scheduler.set_timesteps(2)
    call = {
        **tiny.prompts(pipe), "latents": torch.zeros(1, 4, 16, 16), "timesteps": pipe.scheduler.timesteps,
        "num_inference_steps": 2, "layout": scene.layout, "output": "latents",
    }  # fmt: skip
    for guider, words in (
        (AdaptiveProjectedGuidance(), "AdaptiveProjectedGuidance"),
        (ClassifierFreeGuidance(guidance_rescale=0.5), "guidance_rescale=0.5"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            denoise(pipe, guider=guider)(**call, layout_prompts=scene.prompts(pipe))
    with pytest.raises(ValueError, match="layout_prompts is missing"):
        denoise(pipe, guider=ClassifierFreeGuidance())(**call)
    with pytest.raises(ValueError, match="none of the denoising steps"):
        layerbind_blocks(StableDiffusion3DecodeStep())
    with pytest.raises(ValueError, match="none of the denoising steps"):
        layerbind_blocks(layerbind_blocks(StableDiffusion3DenoiseStep()))
    assert "forward" not in vars(pipe.transformer)
