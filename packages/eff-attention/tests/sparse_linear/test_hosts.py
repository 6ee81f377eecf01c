"""Models of transformers and diffusers, and what no rule reaches."""

import dataclasses

import pytest
import torch
from eff_attention.sparse_linear import (
    SLAConfig,
    apply_sla,
    sla_modules,
)

SMALL = SLAConfig(k_high=0.25, k_low=0.25, block_q=8, block_k=8)
WHOLE = SLAConfig(k_high=1.0, k_low=0.0, block_q=8, block_k=8)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Bert"])
def test_encoders_of_transformers(kind):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "Bert":
        config = transformers.BertConfig(**sizes, vocab_size=50, attn_implementation="sdpa")
        inputs = {"input_ids": torch.randint(50, (2, 64))}
    else:
        settings = {**sizes, "image_size": 32, "patch_size": 4, "attn_implementation": "sdpa"}
        config = getattr(transformers, f"{kind}Config")(**settings)
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        with apply_sla(model, SMALL) as handle:
            assert len(handle.report.changed) == 2
            sparse = model(**inputs).last_hidden_state
            for _, m in sla_modules(model):
                assert m.ran == "sparse"
                m.config = WHOLE
            torch.testing.assert_close(model(**inputs).last_hidden_state, before, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(sparse, before, atol=1e-4)
        assert torch.equal(model(**inputs).last_hidden_state, before)


def test_joint_attention_of_sd3():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([5]),
    }
    with torch.no_grad():
        before = model(**inputs).sample
        with apply_sla(model, SMALL):
            model(**inputs)
            assert [m.ran for _, m in sla_modules(model)] == ["sparse"] * 2
            for _, m in sla_modules(model):
                m.config = WHOLE
            torch.testing.assert_close(model(**inputs).sample, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(**inputs).sample, before)


def test_diffusion_transformers():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16, patch_size=2
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([5]),
        "class_labels": torch.tensor([1]),
    }
    with torch.no_grad():
        before = model(**inputs).sample
        with apply_sla(model, SMALL) as handle:
            assert [e.name for e in handle.report.changed] == [f"transformer_blocks.{i}.attn1" for i in range(2)]
            model(**inputs)
            assert [m.ran for _, m in sla_modules(model)] == ["sparse"] * 2
            for _, m in sla_modules(model):
                m.config = WHOLE
            torch.testing.assert_close(model(**inputs).sample, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(**inputs).sample, before)


def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(64, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def wan():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 12, 12),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
    }


@pytest.mark.parametrize("make", [flux, wan])
def test_transformers_of_pictures_and_videos(make):
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    settings = {"min_tokens": 16}  # cross-attention to eight tokens of text stays dense
    with torch.no_grad():
        before = model(**inputs).sample
        with apply_sla(model, dataclasses.replace(SMALL, **settings)):
            sparse = model(**inputs).sample
            ran = [m.ran for _, m in sla_modules(model)]
            assert ran.count("sparse") == 2
            assert not torch.allclose(sparse, before, atol=1e-4)
            for _, m in sla_modules(model):
                m.config = dataclasses.replace(WHOLE, **settings)
            torch.testing.assert_close(model(**inputs).sample, before, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(**inputs).sample, before)


def vision(kind, **more):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=8,
        **more,
    )  # fmt: skip
    return getattr(transformers, kind.replace("Config", "") + "Model")(config).eval()


def test_autocast_takes_queries_keys_and_values_to_one_dtype():
    """DINOv3 rotates queries and keys in float32 while autocast makes bfloat16 values."""
    model, picture = vision("DINOv3ViT"), torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(picture).last_hidden_state
        with apply_sla(model, WHOLE):
            found = model(picture).last_hidden_state
            assert [m.ran for _, m in sla_modules(model)] == ["sparse"]
    assert (found - before).abs().max() < 0.05 * before.abs().max()


def test_attention_that_no_rule_can_reach_is_skipped():
    model, picture = vision("SiglipVision"), torch.randn(1, 3, 64, 64)
    with apply_sla(model, SMALL) as handle, torch.no_grad():
        skipped = [(e.name, "no rule can reach" in e.reason) for e in handle.report.skipped]
        assert skipped == [
            ("vision_model.head.attention" if hasattr(model, "vision_model") else "head.attention", True)
        ]
        assert model(picture).last_hidden_state.isfinite().all()
        assert [m.ran for _, m in sla_modules(model)] == ["sparse"]


def test_an_eager_host_is_sparse_too():
    model, picture = vision("ViT", attn_implementation="eager"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(picture).last_hidden_state
        with apply_sla(model, SMALL):
            assert not torch.allclose(model(picture).last_hidden_state, before)
        assert torch.equal(model(picture).last_hidden_state, before)
