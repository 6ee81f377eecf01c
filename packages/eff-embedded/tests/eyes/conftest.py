"""A tiny random LLaVA model with LoRA behind pictures, and the same without."""

import copy

import pytest
import torch
from eff_embedded.eyes.lora import PictureLinear, add_lora, watch_pictures

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
PICTURE = 16


@pytest.fixture(scope="session")
def tiny_llava():
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14
        ),
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            initializer_range=0.2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=PICTURE,
        vision_feature_layer=[1, 2],
        vision_feature_select_strategy="default",
        image_seq_length=9,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def base(tiny_llava):
    return copy.deepcopy(tiny_llava)


@pytest.fixture
def eyes(tiny_llava):
    model = copy.deepcopy(tiny_llava)
    torch.manual_seed(1)
    add_lora(model.model.language_model, TARGETS, 4)
    watch_pictures(model.model)
    for module in model.modules():
        if isinstance(module, PictureLinear):
            torch.nn.init.normal_(module.lora_b, std=0.3)
    return model


@pytest.fixture
def prompts():
    """``prompts(kind)``: ids and pixels of "text", "picture" (in the middle) or "two" pictures."""

    def make(kind, seed=0):
        generator = torch.Generator().manual_seed(seed)
        count = {"text": 0, "picture": 1, "two": 2}[kind]
        ids = [5, 6, 7]
        for i in range(count):
            ids += [PICTURE] * 9 + [20 + i, 30 + seed % 7]
        pixels = torch.randn(count, 3, 42, 42, generator=generator) if count else None
        return {"input_ids": torch.tensor([[*ids, 40, 41]]), "pixel_values": pixels}

    return make
