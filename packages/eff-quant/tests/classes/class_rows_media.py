"""Models of pictures and sound, and those that join them with words."""

import torch
import transformers as hf
from class_rows_text import GROUPED, SIZES, ids, words
from class_table import ModelClass

VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
IMAGE = 90  # the token in whose place a picture's features stand


def pixels(seed, count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pictures(name, make, output=lambda out: out.logits, inputs=lambda seed: {"pixel_values": pixels(seed)}):
    return ModelClass(name=name, kind="Pictures and sound", make=make, inputs=inputs, output=output)


def with_words(name, make, inputs):
    return ModelClass(
        name=name,
        kind="Pictures with words",
        make=make,
        inputs=inputs,
        output=lambda out: out.logits,
        prompt=lambda: inputs(5),
    )


def mixed(seed, places, **more):
    """Words with the places of one picture each."""
    text = ids(seed)
    image = torch.full((2, places), IMAGE)
    all_ids = torch.cat([text[:, :2], image, text[:, 2:]], 1)
    return {"input_ids": all_ids, "attention_mask": torch.ones_like(all_ids), **more}


def llava():
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**GROUPED), image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
    )  # fmt: skip


def qwen():
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64,
              "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]}  # fmt: skip
    text = {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92,
        vision_end_token_id=93,
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen_inputs(seed):
    # A picture of 4 x 4 patches of 4 x 4 points and 2 frames; four patches become one token.
    patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))
    more = mixed(seed, 4, pixel_values=patches, image_grid_thw=torch.tensor([[1, 4, 4]] * 2))
    more["mm_token_type_ids"] = (more["input_ids"] == IMAGE).int()
    return more


def idefics3():
    config = hf.Idefics3Config(
        vision_config=VISION, text_config=hf.LlamaConfig(**GROUPED), image_token_id=IMAGE, scale_factor=2,
        pad_token_id=0,
    )  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config)


def paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=64), image_token_index=IMAGE, projection_dim=64,
        text_config=hf.GemmaConfig(**GROUPED, head_dim=16), hidden_size=64, vocab_size=96,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


def paligemma_inputs(seed):
    inputs = mixed(seed, 16, pixel_values=pixels(seed))
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def two_towers(model, config, text, vision):
    text_sizes = {k: v for k, v in SIZES.items() if k not in ("bos_token_id",)}
    return getattr(hf, model)(
        getattr(hf, config)(
            text_config=getattr(hf, text)(**text_sizes).to_dict(), vision_config=getattr(hf, vision)(**VISION).to_dict()
        )
    )


def whisper():
    sizes = {
        "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 96,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 8,
        "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes))


def whisper_inputs(seed):
    sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(seed))
    return {"input_features": sound, "decoder_input_ids": ids(seed)[:, :4]}


def wav2vec2():
    sizes = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    return hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **sizes, conv_dim=(32, 32), conv_stride=(4, 2), conv_kernel=(8, 4), num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
        )
    )  # fmt: skip


def sound(seed):
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(seed))}


ROWS = [
    pictures("ViTForImageClassification", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3))),
    pictures("Dinov2Model", lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION)), lambda out: out.last_hidden_state),
    pictures(
        "SwinForImageClassification",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=3
            )
        ),
    ),
    pictures(
        "SegformerForSemanticSegmentation",
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                num_encoder_blocks=2,
                depths=[1, 1],
                sr_ratios=[2, 1],
                hidden_sizes=[32, 64],
                patch_sizes=[7, 3],
                strides=[4, 2],
                num_attention_heads=[2, 4],
                mlp_ratios=[2, 2],
                decoder_hidden_size=32,
                num_labels=3,
            )
        ),
    ),
    pictures(
        "CLIPModel",
        lambda: two_towers("CLIPModel", "CLIPConfig", "CLIPTextConfig", "CLIPVisionConfig"),
        lambda out: torch.cat([out.text_embeds, out.image_embeds]),
        lambda seed: {**words(seed), "pixel_values": pixels(seed)},
    ),
    pictures(
        "SiglipModel",
        lambda: two_towers("SiglipModel", "SiglipConfig", "SiglipTextConfig", "SiglipVisionConfig"),
        lambda out: torch.cat([out.text_embeds, out.image_embeds]),
        lambda seed: {**words(seed), "pixel_values": pixels(seed)},
    ),
    ModelClass(
        name="WhisperForConditionalGeneration",
        kind="Pictures and sound",
        make=whisper,
        inputs=whisper_inputs,
        output=lambda out: out.logits,
        prompt=lambda: {"input_features": whisper_inputs(5)["input_features"]},
    ),
    pictures("Wav2Vec2ForCTC", wav2vec2, inputs=sound),
    with_words("LlavaForConditionalGeneration", llava, lambda seed: mixed(seed, 16, pixel_values=pixels(seed))),
    with_words("Qwen2_5_VLForConditionalGeneration", qwen, qwen_inputs),
    with_words(
        "Idefics3ForConditionalGeneration",
        idefics3,
        lambda seed: mixed(seed, 4, pixel_values=pixels(seed)[:, None]),
    ),
    with_words("PaliGemmaForConditionalGeneration", paligemma, paligemma_inputs),
]
