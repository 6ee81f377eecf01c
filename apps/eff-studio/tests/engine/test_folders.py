"""Folders of SD3 and FLUX as a user gives them: loaded by their path, drawn with, painted into, searched for words."""

import warnings

import numpy as np
import pytest
import torch
from eff_studio.engine import load_model, run_work
from eff_studio.work import Generate, Heads, Insert, LayerBox, Segment
from PIL import Image

SIDE = 64
LAYERS = (LayerBox(prompt="a dog", box=(0, 0, 0.5, 1)), LayerBox(prompt="a cat", box=(0.25, 0.25, 1, 1)))
CHARACTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer():
    """CLIP's tokenizer with letters alone."""
    from transformers import CLIPTokenizer

    words = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def clip_encoder(tokenizer, *, projected):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, hidden_act="gelu",
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width):
    """T5's tokenizer and encoder with letters alone."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in CHARACTERS)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    return tokenizer, T5EncoderModel(config)


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 16), latent_channels=4, norm_num_groups=4, sample_size=SIDE, scaling_factor=1.5,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, shift_factor=0.06,
        use_quant_conv=False, use_post_quant_conv=False, layers_per_block=1,
    )  # fmt: skip


def sd3():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    one, two = clip_tokenizer(), clip_tokenizer()
    three, encoder = t5(64)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=one,
        text_encoder=clip_encoder(one, projected=True), text_encoder_2=clip_encoder(two, projected=True),
        tokenizer_2=two, tokenizer_3=three, text_encoder_3=encoder,
    )  # fmt: skip


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    one = clip_tokenizer()
    two, encoder = t5(32)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=one,
        text_encoder=clip_encoder(one, projected=False), tokenizer_2=two, text_encoder_2=encoder,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[sd3, flux], ids=["sd3", "flux"])
def model(request, tmp_path_factory):
    """The studio's model of a folder that diffusers wrote."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = request.param()
        for parameter in pipe.transformer.parameters():  # so that no part is nought and does nothing
            if parameter.detach().count_nonzero() == 0:
                torch.nn.init.normal_(parameter, std=0.05)
        pipe.save_pretrained(folder / "pipeline")
        return load_model(str(folder / "pipeline"))


def draw(model, work, **files):
    told = []
    result = run_work(
        model, work, open_picture=files.__getitem__, report=told.append, cancelled=lambda: False, previews=lambda: True
    )
    assert told
    return [np.array(image) for image in result.images]


def plain(model):
    return draw(model, Generate(prompt="a dog", steps=3, seed=4, width=SIDE, height=SIDE))[0]


def test_what_the_page_is_told(model):
    facts = model.facts()
    assert facts["resizable"]
    assert facts["multiple"] == 8
    assert set(facts["heads"]) == {2}


def test_pictures_of_other_sizes_and_seeds(model):
    first = plain(model)
    assert first.shape == (SIDE, SIDE, 3)
    assert np.array_equal(first, plain(model))
    assert draw(model, Generate(prompt="a dog", steps=2, width=96, height=SIDE))[0].shape == (SIDE, 96, 3)
    assert not np.array_equal(first, draw(model, Generate(prompt="a dog", steps=3, seed=5, width=SIDE, height=SIDE))[0])
    with pytest.raises(ValueError, match="multiples of 8"):
        draw(model, Generate(prompt="a dog", steps=2, width=92, height=SIDE))


HEADS = {"heads": Heads(weights=((0, 1, 1.0), (2, 0, 0.5)))}


@pytest.mark.parametrize(
    "more", [{"layers": LAYERS}, HEADS, {"layers": LAYERS, **HEADS}], ids=["layers", "heads", "both"]
)
def test_methods_change_the_picture_and_come_off(model, more):
    first = plain(model)
    work = Generate(prompt="a dog", steps=3, seed=4, width=SIDE, height=SIDE, **more)
    changed = draw(model, work)[0]
    assert not np.array_equal(first, changed)
    assert np.array_equal(changed, draw(model, work)[0])
    assert np.array_equal(first, plain(model))


def test_a_negative_prompt(model):
    work = Generate(prompt="a dog", negative="a cat", steps=3, seed=4, width=SIDE, height=SIDE)
    if "Flux" in type(model.pipe).__name__:
        with pytest.raises(ValueError, match="no negative prompt"):
            draw(model, work)
    else:
        assert not np.array_equal(draw(model, work)[0], plain(model))


def test_insert_and_segment(model):
    picture, hole = Image.fromarray(plain(model)), Image.new("L", (SIDE, SIDE))
    hole.paste(255, (0, 0, 32, 32))
    work = Insert(subject="s", target="t", mask="m", prompt="a dog", steps=2)
    painted = draw(model, work, s=picture, t=picture, m=hole)[0]
    assert painted.ndim == 3
    heat, mask = draw(model, Segment(picture="t", phrase="dog"), t=picture)
    assert heat.shape[:2] == mask.shape[:2] == (SIDE, SIDE)
    assert np.array_equal(plain(model), plain(model))
