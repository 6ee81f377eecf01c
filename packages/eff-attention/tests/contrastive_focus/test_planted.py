"""A model that always stares at one patch and looks for another when asked: only the contrast finds the second."""

import math

import pytest
import torch
from eff_attention.contrastive_focus import attention_regions, contrast_attention, fuse_attention
from eff_attention.contrastive_focus import record_image_attention as record

transformers = pytest.importorskip("transformers")

BOS, ASK, DESCRIBE, IMAGE = 1, 2, 3, 4
RED, BLUE, IS_ASK = 5, 6, 7  # channels of the text model
STARE, LOOK = 12.0, 4.0  # weights of the blue patch always, and of the red one when asked, beside 1 of others


@pytest.fixture(scope="module")
def staring():
    """Patches come through as their colours. Every query stares at blue; the asking one also looks for red."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=16,
        num_key_value_heads=1, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        pad_token_id=0, bos_token_id=None, eos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            image_seq_length=16,
        )
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        tower = {name.rpartition(".")[2]: module for name, module in model.model.vision_tower.named_modules()}
        tower["pre_layrnorm"].weight.fill_(1.0)
        for channel in range(3):
            tower["patch_embedding"].weight[channel, channel] = 1 / 16  # the mean colour
        projector = model.model.multi_modal_projector
        for channel, (colour, others) in {RED: (0, (1, 2)), BLUE: (2, (0, 1))}.items():
            projector.linear_1.weight[channel, colour] = 20.0
            projector.linear_1.weight[channel, list(others)] = -20.0  # grey is neither
            projector.linear_2.weight[channel, channel] = 1.0
        language = model.model.language_model
        for token in (BOS, ASK, DESCRIBE):
            language.embed_tokens.weight[token, token] = 1.0
        language.embed_tokens.weight[ASK, IS_ASK] = 1.0
        language.norm.weight.fill_(1.0)
        (layer,) = language.layers
        layer.input_layernorm.weight.fill_(1.0)
        attention = layer.self_attn
        slow = (6, 7)  # channels that rotary embedding leaves alone
        attention.q_proj.bias[slow[0]] = 1.0
        attention.q_proj.weight[slow[1], IS_ASK] = 1 / math.sqrt(8)  # of a token with two ones the norm makes sqrt(8)
        attention.k_proj.weight[slow[0], BLUE] = math.log(STARE)  # a patch of one colour is 4 behind the norm
        attention.k_proj.weight[slow[1], RED] = math.log(LOOK)
        model.lm_head.weight[BOS, BOS] = 1.0
    return model, torch.full((1, 3, 16, 16), 0.5)


def painted(pixels, **patches):
    """The grey picture with patches (row, column) of full colour."""
    out = pixels.clone()
    for name, (row, column) in patches.items():
        part = out[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        part.zero_()
        part["rgb".index(name[0])] = 1.0
    return out


def look(model, pixels, token):
    ids = torch.tensor([[BOS, *[IMAGE] * 16, token]])
    return record(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels},
        [0],
        max_new_tokens=1,
    )


def patch(row, column):
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    return mask


def fit(score, wanted):
    """Intersection over union of the best sixteenth of a score with a patch."""
    mask = attention_regions(score, 1 / 16, 1)
    return float((mask & wanted).sum() / (mask | wanted).sum())


@pytest.mark.parametrize(("red", "blue"), [((1, 2), (2, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2))])
def test_contrast_finds_what_is_asked_for_behind_a_distractor(staring, red, blue):
    model, pixels = staring
    seen = painted(pixels, red=red, blue=blue)
    general, asked = (look(model, seen, token) for token in (DESCRIBE, ASK))
    weights = asked.maps[0, 0].view(4, 4)
    others = 1 / (STARE + LOOK + 14 + 2)
    assert float(weights[blue]) == pytest.approx(STARE * others, rel=1e-3)
    assert float(weights[red]) == pytest.approx(LOOK * others, rel=1e-3)
    plain = fuse_attention(asked.maps, (4, 4), (16, 16))
    score = fuse_attention(contrast_attention(asked.maps, general.maps), (4, 4), (16, 16))
    assert int(plain.argmax()) in patch(*blue).flatten().nonzero()
    assert int(score.argmax()) in patch(*red).flatten().nonzero()
    assert (fit(score, patch(*red)), fit(plain, patch(*red)), fit(plain, patch(*blue))) == (1, 0, 1)
    # Of every patch but the red one the ratio is the same: what the general request sees is gone exactly.
    ratio = (asked.maps / general.maps)[0, 0].view(4, 4)
    rest = ratio[ratio != ratio[red]]
    torch.testing.assert_close(rest, torch.full_like(rest, float(rest[0])), rtol=1e-4, atol=0)
    assert float(ratio[red] / rest[0]) == pytest.approx(LOOK, rel=1e-3)
