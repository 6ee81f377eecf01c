"""Tiny random models of many classes, with the arguments of one forward."""

import pytest
import torch

TINY = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def ids(length=12, batch=2, seed=0):
    return torch.randint(5, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def sharpen(model, names=("q_proj", "k_proj", "query", "key", ".q.", ".k.", "to_q", "to_k", "qkv"), by=8.0):
    """Random projections give flat attention, which hides mistakes in masks; larger ones do not."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in names) and name.endswith("weight"):
            parameter.data.mul_(by)
    return model.eval()


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**TINY, **more})), {"input_ids": ids()}


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**TINY)), {"input_ids": ids()}


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**TINY, head_dim=16, query_pre_attn_scalar=16, sliding_window=4, attn_logit_softcapping=5.0)
    return Gemma2ForCausalLM(config), {"input_ids": ids()}


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **TINY, head_dim=16, query_pre_attn_scalar=16, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config), {"input_ids": ids()}


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**TINY, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_().add_(1.0)
    return model, {"input_ids": ids()}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)), {
        "input_ids": ids()
    }


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    return T5ForConditionalGeneration(config), {
        "input_ids": ids(), "attention_mask": mask, "decoder_input_ids": ids(7, seed=1)
    }  # fmt: skip


def whisper():
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=97, num_mel_bins=8, encoder_layers=2, encoder_attention_heads=4, decoder_layers=2,
        decoder_attention_heads=4, decoder_ffn_dim=32, encoder_ffn_dim=32, d_model=32, max_source_positions=10,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperModel(config), {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": ids(7)}


def bert():
    from transformers import BertConfig, BertModel

    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    config = BertConfig(vocab_size=97, **TOWER)
    return BertModel(config), {"input_ids": ids(), "attention_mask": mask}


def clip():
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={**TOWER, "vocab_size": 97, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
    )
    return CLIPModel(config), {"input_ids": ids(), "pixel_values": torch.randn(2, 3, 16, 16)}


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**TOWER, image_size=16, patch_size=4)), {"pixel_values": torch.randn(2, 3, 16, 16)}


def dinov2():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**TOWER, image_size=16, patch_size=4)
    return Dinov2Model(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def dinov3():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(**TOWER, image_size=16, patch_size=4)
    return DINOv3ViTModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**TOWER, image_size=16, patch_size=4)
    return SiglipVisionModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def llava(pictures=1):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=16, patch_size=4),
        text_config=LlamaConfig(**TINY),
        image_token_id=96,
    )
    row = [5, 6, *([96] * 16 + [7]) * pictures, 8, 9]
    return LlavaForConditionalGeneration(config), {
        "input_ids": torch.tensor([row, row]), "pixel_values": torch.randn(2 * pictures, 3, 16, 16)
    }  # fmt: skip


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        text_config={**TINY, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 4,
            "out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1], "in_channels": 3,
        },
        image_token_id=96, video_token_id=95, vision_start_token_id=94, vision_end_token_id=93,
    )  # fmt: skip
    grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
    rows = [[5, 94, *[96] * 6, 93, 6, 7], [5, 94, *[96] * 4, 93, 6, 7, 8, 9]]
    patches = torch.randn(24 + 16, 3 * 2 * 4 * 4)
    return Qwen2_5_VLForConditionalGeneration(config), {
        "input_ids": torch.tensor(rows), "pixel_values": patches, "image_grid_thw": grids,
        "mm_token_type_ids": (torch.tensor(rows) == 96).int(),
    }  # fmt: skip


def sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([1.0, 2.0]),
    }  # fmt: skip


def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return model, {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.1, 0.2]),
        "img_ids": grid, "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def unet():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    return model, {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(2, 5, 32), "encoder_attention_mask": mask,
    }  # fmt: skip


class Attention(torch.nn.Module):
    """The form that timm and DINO give an attention: one projection for all three, fused attention."""

    def __init__(self, dim=32, num_heads=4):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(torch.nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.norm, self.attn = torch.nn.LayerNorm(dim), Attention(dim)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.GELU(), torch.nn.Linear(dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


def timm_style():
    return torch.nn.Sequential(Block(), Block()), {"input": torch.randn(2, 10, 32)}


MODELS = {
    f.__name__: f
    for f in (
        llama, qwen2, gemma2, gemma3, gpt_oss, gpt2, t5, whisper, bert, clip, vit, dinov2, dinov3, siglip, llava,
        qwen2_5_vl, sd3, flux, unet, timm_style,
    )
}  # fmt: skip


def answer(model, arguments):
    """The model's main output."""
    out = model(**arguments)
    for name in ("logits", "sample", "last_hidden_state", "image_embeds"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out


@pytest.fixture
def zoo():
    def make(name, **more):
        torch.manual_seed(0)
        model, arguments = MODELS[name](**more)
        return sharpen(model), arguments

    make.names, make.answer, make.ids = list(MODELS), answer, ids
    return make


def pytest_generate_tests(metafunc):
    if "each_model" in metafunc.fixturenames:
        metafunc.parametrize("each_model", list(MODELS))
