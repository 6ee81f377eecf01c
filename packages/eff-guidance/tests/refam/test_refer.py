"""The whole way from a picture and a phrase to a point, on tiny pipelines and on the trained collage diffusion."""

import pytest
import torch
from eff_guidance.refam import EncodedPrompt, RefAMConfig, encode_expression, encode_picture, refer, sam_segmenter


def prompt(pipe, roles=("stop", "content", "special", "magnet", "special", "pad")):
    draw = torch.Generator().manual_seed(0)
    width = 64 if hasattr(pipe, "text_encoder_3") else 32
    embeds, pooled = torch.randn(1, 6, 32, generator=draw), torch.randn(1, width, generator=draw)
    return EncodedPrompt(embeds, pooled, ("the", "dog", "</s>", "pink", "</s>", ""), roles)


@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux"])
@pytest.mark.parametrize("shape", [(40, 64), (70, 50)])
def test_tiny_pipelines(tiny, name, shape):
    pipe = tiny.pipeline(name)
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    config = RefAMConfig(size=64, draws=2)
    found = refer(pipe, image, "the dog", config, prompt=prompt(pipe))
    assert found.heatmap.shape == found.mask.shape == shape
    rows, columns = found.grid
    assert found.maps.shape == (rows * columns, 6)
    assert (rows < columns) == (shape[0] < shape[1])
    x, y = found.point_xy
    assert found.mask[y, x]
    assert found.box[0] <= x < found.box[2]
    assert found.kept.tolist() == [False, True, False, False, False, False]
    again = refer(pipe, image, "the dog", config, prompt=prompt(pipe))
    assert torch.equal(again.heatmap, found.heatmap)
    other = refer(pipe, image, "the dog", RefAMConfig(size=64, draws=2, seed=5), prompt=prompt(pipe))
    assert not torch.equal(other.heatmap, found.heatmap)
    assert not any("forward" in vars(m) for m in pipe.transformer.modules())
    mask = torch.zeros(shape, dtype=torch.bool)
    assert refer(pipe, image, "dog", config, prompt=prompt(pipe), segmenter=lambda *a: mask).box is None


def test_latents_are_packed_as_the_pipeline_does(tiny):
    from diffusers import FluxPipeline
    from eff_guidance.refam.encode import run_transformer

    pipe = tiny.pipeline("flux", guidance=True)
    latents, grid = encode_picture(pipe, torch.rand(3, 64, 32), 64)
    seen = {}
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    run_transformer(pipe, latents, grid, prompt(pipe), 0.3)
    count, channels, height, width = latents.shape
    assert (height, width) == (2 * grid[0], 2 * grid[1])
    assert torch.equal(seen["hidden_states"], FluxPipeline._pack_latents(latents, count, channels, height, width))
    ids = FluxPipeline._prepare_latent_image_ids(1, grid[0], grid[1], "cpu", torch.float32)
    assert torch.equal(seen["img_ids"], ids)
    assert "guidance" in seen


def text_encoders(tokenizer, width=32):
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )  # fmt: skip

    torch.manual_seed(0)
    size = len(tokenizer)
    clip = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=size,
        projection_dim=32, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(vocab_size=size, d_model=width, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    return CLIPTextModel(clip).eval(), CLIPTextModelWithProjection(clip).eval(), T5EncoderModel(t5).eval()


def test_flux_reads_ids_and_pools_the_plain_expression(tiny, t5_like):
    pipe = tiny.pipeline("flux")
    with pytest.raises(ValueError, match=r"no text_encoder, tokenizer.*pass prompt="):
        refer(pipe, torch.rand(3, 32, 32), "the dog")
    clip, _, t5 = text_encoders(t5_like)
    pipe.register_modules(text_encoder=clip, tokenizer=t5_like, text_encoder_2=t5, tokenizer_2=t5_like)
    pipe.tokenizer_max_length = 12
    found = encode_expression(pipe, "the red car", RefAMConfig())
    wanted = pipe.encode_prompt("the red car", None)
    assert found.embeds.shape == (1, 512, 32)
    assert torch.equal(found.pooled, wanted[1])
    bare = encode_expression(pipe, "the red car", RefAMConfig(magnets=()))
    torch.testing.assert_close(bare.embeds, wanted[0])
    assert not torch.allclose(found.embeds, wanted[0])
    assert found.role.count("magnet") == 5
    assert found.role.count("special") == 6
    together = encode_expression(pipe, "the red car", RefAMConfig(separate_eos=False))
    assert together.role.count("special") == 1
    out = refer(pipe, torch.rand(3, 32, 32), "the red car", RefAMConfig(size=64))
    assert int(out.kept.sum()) == 2


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_reads_both(tiny, t5_like, with_t5):
    pipe = tiny.pipeline("sd3")
    clip, t5 = text_encoders(t5_like, width=64)[1:]
    pipe.register_modules(text_encoder=clip, tokenizer=t5_like, text_encoder_2=clip, tokenizer_2=t5_like)
    if with_t5:
        pipe.register_modules(text_encoder_3=t5, tokenizer_3=t5_like)
    pipe.tokenizer_max_length = 16
    pipe.transformer.register_to_config(joint_attention_dim=64)  # CLIP's two states side by side
    found = encode_expression(pipe, "the red car", RefAMConfig())
    states, _, pooled, _ = pipe.encode_prompt("the red car", None, None, do_classifier_free_guidance=False)
    assert found.embeds.shape == (1, 16 + 256, 64)
    assert found.role[:3] == ("stop", "content", "content")
    assert torch.equal(found.pooled, pooled)
    behind = found.role[16:]
    if with_t5:
        assert behind[:6] == ("stop", "content", "content", "special", "magnet", "special")
        assert not torch.allclose(found.embeds, states)
    else:
        assert behind == ("pad",) * 256
    bare = encode_expression(pipe, "the red car", RefAMConfig(magnets=()))
    torch.testing.assert_close(bare.embeds, states)


def test_what_is_refused(tiny):
    pipe = tiny.pipeline("sd15")
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline"):
        refer(pipe, torch.rand(3, 32, 32), "the dog")
    pipe = tiny.pipeline("flux")
    with pytest.raises(ValueError, match=r"wanted floats \[3, H, W\]"):
        refer(pipe, torch.rand(1, 32, 32), "the dog", prompt=prompt(pipe))
    with pytest.raises(ValueError, match="6 tokens and 5 roles"):
        EncodedPrompt(torch.zeros(1, 6, 4), torch.zeros(1, 4), ("a",) * 6, ("stop",) * 5)


def test_a_content_word_as_sink_warns(tiny, monkeypatch):
    import importlib

    module = importlib.import_module("eff_guidance.refam.refer")
    pipe = tiny.pipeline("flux")
    flag = torch.tensor([False, True, False, False, False, False])
    monkeypatch.setattr(module, "find_global_sinks", lambda *a, **k: flag)
    with pytest.warns(UserWarning, match="'dog'"):
        found = refer(pipe, torch.rand(3, 32, 32), "the dog", RefAMConfig(size=64), prompt=prompt(pipe))
    assert found.kept.tolist() == [True, True, False, False, False, False]


def test_sam():
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32, "image_size": 64,
              "patch_size": 16, "output_channels": 16, "global_attn_indexes": (0,), "window_size": 2,
              "num_pos_feats": 8}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16,
                                                     "image_embedding_size": 4, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16, "attention_downsample_rate": 1},
    )  # fmt: skip
    model = transformers.SamModel(config).eval()
    processor = transformers.SamProcessor(
        transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    )
    heat = torch.zeros(30, 50)
    heat[5:12, 20:30] = 1
    for choose in ("score", "heatmap"):
        mask = sam_segmenter(model, processor, choose=choose)(torch.rand(3, 30, 50), (24, 8), heat)
        assert mask.shape == (30, 50)
        assert mask.dtype == torch.bool
    with pytest.raises(ValueError, match="choose='best'"):
        sam_segmenter(model, processor, choose="best")


def test_points_at_objects_of_collages(collages):
    from eff_embedded.diffusion import example

    hits, points = [], []
    given = [example(seed).collage for seed in range(4)]
    for collage in given:
        for name, seen in zip(collage.names, collage.visible, strict=True):
            found = refer(collages, collage.tensor(), f"the {name}")
            x, y = found.point_xy
            hits.append(bool(seen[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8].any()))
            points.append((x, y))
    assert sum(hits) / len(hits) > 0.55
    # bfloat16 points at the same patch or the next
    collages.transformer.bfloat16()
    near = refer(collages, given[0].tensor(), f"the {given[0].names[0]}").point_xy
    assert max(abs(a - b) for a, b in zip(near, points[0], strict=True)) <= 16
