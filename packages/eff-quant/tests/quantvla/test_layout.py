"""Which layers a layout takes in, on the module names of real policies."""

import pytest
from eff_quant.quantvla import QuantLayout
from torch import nn

LLM = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
VISION = [f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["mlp.fc1", "mlp.fc2"]


def gr00t():
    """Linear layers of GR00T N1.5: Eagle with a Qwen3 of 12 layers, an action head of 16 diffusers blocks."""
    root = "backbone.eagle_model"
    names = [f"{root}.vision_model.vision_model.encoder.layers.{i}.{p}" for i in range(27) for p in VISION]
    names += [f"{root}.language_model.model.layers.{i}.{p}" for i in range(12) for p in LLM]
    names += [f"{root}.language_model.lm_head", f"{root}.mlp1.1", "backbone.eagle_linear"]
    head = "action_head.model"
    attention = [f"attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
    block = [*attention, "ff.net.0.proj", "ff.net.2", "norm1.linear"]
    names += [f"{head}.transformer_blocks.{i}.{p}" for i in range(16) for p in block]
    names += [f"{head}.timestep_encoder.timestep_embedder.linear_1", f"{head}.proj_out_1", f"{head}.proj_out_2"]
    names += [f"action_head.{p}" for p in ("state_encoder.layer1", "action_encoder.W1", "action_decoder.layer1")]
    vl = [f"action_head.vl_self_attention.transformer_blocks.{i}.{p}" for i in range(4) for p in block]
    return names + vl


def pi05():
    """Linear layers of pi0.5 in openpi and LeRobot."""
    root = "model.paligemma_with_expert"
    tower = "paligemma.model.vision_tower.vision_model.encoder.layers"
    names = [f"{root}.{tower}.{i}.{p}" for i in range(27) for p in VISION]
    names += [f"{root}.paligemma.model.multi_modal_projector.linear"]
    names += [f"{root}.paligemma.model.language_model.layers.{i}.{p}" for i in range(18) for p in LLM]
    names += [f"{root}.gemma_expert.model.layers.{i}.{p}" for i in range(18) for p in LLM]
    names += [f"{root}.gemma_expert.lm_head", f"{root}.paligemma.lm_head"]
    return names + [f"model.{p}" for p in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")]


@pytest.mark.parametrize(
    ("preset", "names", "encoder", "head"),
    [
        ("gr00t_n1_5", gr00t(), ("language_model", 84), ("action_head", 32)),
        ("pi05", pi05(), ("paligemma.model", 126), ("gemma_expert", 54)),
    ],
)
def test_presets_take_the_language_model_and_the_mlps_of_the_head(preset, names, encoder, head):
    layout = QuantLayout.preset(preset)
    chosen = layout.select_names(names)
    for part, count in (encoder, head):
        assert sum(part in n for n in chosen) == count
    assert len(chosen) == encoder[1] + head[1]
    in_head = [n for n in chosen if head[0] in n]
    assert not any(word in n for n in in_head for word in ("attn", "to_q", "q_proj"))
    assert not any(word in n for n in chosen for word in ("vision", "lm_head", "norm", "encoder"))


def test_the_dit_preset_fits_diffusers_models():
    from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=4, num_embeds_ada_norm=4
    )
    layout = QuantLayout.preset("dit")
    expected = [f"transformer_blocks.{i}.ff.net.{p}" for i in range(3) for p in ("0.proj", "2")]
    assert layout.linears(dit) == expected
    sd3 = SD3Transformer2DModel(
        sample_size=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        in_channels=4,
    )
    chosen = layout.linears(sd3)
    assert len(chosen) == 6  # the last block has no MLP for the text
    assert all(".ff" in n for n in chosen)


def test_a_layout_that_fits_nothing_raises():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"none of the 1 linear layers fits .*transformer_.*: 0$"):
        QuantLayout.preset("dit").linears(model)


def test_half_a_model_is_not_taken_without_a_word():
    renamed = [n.replace("transformer_blocks", "layers") for n in gr00t()]
    with pytest.raises(ValueError, match=r"linear layers fits 're:.*action_head"):
        QuantLayout.preset("gr00t_n1_5").select_names(renamed)


def test_excluding_a_module_excludes_what_is_inside():
    layout = QuantLayout(include=("re:.*proj",), exclude=("tower",))
    names = ["a.tower.deep.proj", "a.towers.proj", "proj"]
    assert layout.select_names(names) == ["a.towers.proj", "proj"]
    assert layout("a.towers.proj", nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"include": "q_proj"}, TypeError, r"use a tuple, such as \('q_proj',\)"),
        ({"include": ()}, ValueError, "name at least one pattern"),
        ({"include": ("a",), "bits": (4, 4)}, ValueError, r"bits=\(4, 4\); use \(4, 8\) or \(8, 8\)"),
    ],
)
def test_a_wrong_value_is_refused(values, error, says):
    with pytest.raises(error, match=says):
        QuantLayout(**values)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no layout 'pi0'; use one of 'gr00t_n1_5', 'pi05', 'dit'"):
        QuantLayout.preset("pi0")
