"""Tiny models of diffusers with random weights, whole pipelines around them, and the trained collage diffusion."""

import functools
import warnings

import pytest
import torch

SIZE = 64  # points a side of the tiny pipelines' pictures


def sd3_transformer(*, dual=(), layers=3, heads=2, size=16, seed=0, qk_norm=None):
    """SD3's transformer; with ``dual`` (indices of blocks) SD3.5-medium's."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=size, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=heads, joint_attention_dim=32, caption_projection_dim=8 * heads, pooled_projection_dim=64,
        out_channels=4, pos_embed_max_size=96, dual_attention_layers=tuple(dual),
        qk_norm=qk_norm or ("rms_norm" if dual else None),
    )  # fmt: skip
    return stir(model)


def flux_transformer(*, channels=16, layers=2, single=2, heads=2, guidance=False, seed=0):
    """FLUX's transformer; ``channels`` of the packed input (FLUX Fill has more of them)."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=channels, out_channels=16, num_layers=layers, num_single_layers=single,
        attention_head_dim=16, num_attention_heads=heads, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    return stir(model)


def unet(*, xl=False, seed=0):
    """SD1.5's UNet, with ``xl`` SDXL's conditioning."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    more = {} if not xl else {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
        "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
    }  # fmt: skip
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(2, 4), norm_num_groups=4, **more,
    )  # fmt: skip
    return stir(model)


def stir(model):
    """Random numbers where an initialisation left zeros, so that every part matters."""
    for p in model.parameters():
        if p.detach().count_nonzero() == 0:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


def vae(*, channels=4, seed=0):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=channels,
        norm_num_groups=4, sample_size=SIZE, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
        scaling_factor=1.5,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def sd3_pipeline(**settings):
    """StableDiffusion3Pipeline without text encoders: prompts come as embeddings (`prompts`)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    none = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    return quiet(
        StableDiffusion3Pipeline, transformer=sd3_transformer(**settings), vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(), **none,
    )  # fmt: skip


def flux_pipeline(*, fill=False, guidance=False, **settings):
    """FluxPipeline or FluxFillPipeline without text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxPipeline

    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    # Packed latents 16, packed masked picture 16, and the mask: 4 x 4 points a latent, 4 latents a token.
    channels = 16 + 16 + 64 if fill else 16
    return quiet(
        FluxFillPipeline if fill else FluxPipeline, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=flux_transformer(channels=channels, guidance=guidance, **settings), **none,
    )  # fmt: skip


def unet_pipeline(**settings):
    """StableDiffusionPipeline (SD1.5) without text encoder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return quiet(
        StableDiffusionPipeline, unet=unet(**settings), vae=vae(), scheduler=DDIMScheduler(), text_encoder=None,
        tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def quiet(cls, **parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(pipe, *, count=1, tokens=6, seed=0, guided=True):
    """Random prompt embeddings under the names that the pipeline's call takes."""
    draw = torch.Generator().manual_seed(seed)
    name = type(pipe).__name__
    width = 64 if "StableDiffusion3" in name else 32
    found = {"prompt_embeds": torch.randn(count, tokens, 32, generator=draw)}
    if "StableDiffusionPipeline" not in name:
        found["pooled_prompt_embeds"] = torch.randn(count, width, generator=draw)
    if guided and "Flux" not in name:
        found["negative_prompt_embeds"] = torch.randn(count, tokens, 32, generator=draw)
        if "StableDiffusion3" in name:
            found["negative_pooled_prompt_embeds"] = torch.randn(count, width, generator=draw)
    return found


def inputs(model, *, count=1, tokens=6, side=8, seed=0):
    """Arguments of one call: ``side`` x ``side`` picture tokens (UNet: twice that in latents)."""
    draw = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=draw)
    name, text = type(model).__name__, randn(count, tokens, 32)
    if name == "SD3Transformer2DModel":
        return {
            "hidden_states": randn(count, 4, 2 * side, 2 * side), "encoder_hidden_states": text,
            "pooled_projections": randn(count, 64), "timestep": torch.full((count,), 400.0),
        }  # fmt: skip
    if name == "FluxTransformer2DModel":
        ids = torch.zeros(side * side, 3)
        ids[:, 1], ids[:, 2] = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        found = {
            "hidden_states": randn(count, side * side, model.config.in_channels), "encoder_hidden_states": text,
            "pooled_projections": randn(count, 32), "timestep": torch.full((count,), 0.4), "img_ids": ids,
            "txt_ids": torch.zeros(tokens, 3),
        }  # fmt: skip
        if model.config.guidance_embeds:
            found["guidance"] = torch.full((count,), 3.5)
        return found
    found = {
        "sample": randn(count, 4, 2 * side, 2 * side), "timestep": torch.full((count,), 400),
        "encoder_hidden_states": text,
    }  # fmt: skip
    if model.config.addition_embed_type == "text_time":
        found["added_cond_kwargs"] = {"text_embeds": randn(count, 32), "time_ids": randn(count, 6)}
    return found


MODELS = {
    "sd3": sd3_transformer,
    "sd3.5": functools.partial(sd3_transformer, dual=(0, 1)),
    "flux": flux_transformer,
    "sd15": unet,
    "sdxl": functools.partial(unet, xl=True),
}
PIPELINES = {
    "sd3": sd3_pipeline,
    "sd3.5": functools.partial(sd3_pipeline, dual=(0, 1)),
    "flux": flux_pipeline,
    "flux-fill": functools.partial(flux_pipeline, fill=True),
    "sd15": unet_pipeline,
}


class Tiny:
    """``tiny.model("sd3")``, ``tiny.pipeline("flux")``, ``tiny.prompts(pipe)``, ``tiny.inputs(model)``."""

    size = SIZE
    prompts = staticmethod(prompts)
    inputs = staticmethod(inputs)

    @staticmethod
    def model(name, **settings):
        """A fresh model of a kind of `MODELS`."""
        return MODELS[name](**settings)

    @staticmethod
    def pipeline(name, **settings):
        """A fresh pipeline of a kind of `PIPELINES`."""
        return PIPELINES[name](**settings)


@pytest.fixture
def tiny():
    return Tiny()


@pytest.fixture(scope="session")
def collage_parts():
    """The trained collage diffusion, once: do not change it (`collages` copies)."""
    return pytest.importorskip("eff_embedded.diffusion").load_collage_diffusion()


@pytest.fixture
def collages(collage_parts):
    """A pipeline of the trained collage diffusion whose transformer may be changed."""
    import copy

    pipe = type(collage_parts)(**{**collage_parts.components, "transformer": copy.deepcopy(collage_parts.transformer)},
                               **{k: collage_parts.config[k] for k in ("prompt_mean", "prompt_std")})  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
