"""Networks of diffusion models."""

import diffusers
import torch
from class_table import ModelClass


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row(name, inputs, **config):
    return ModelClass(
        name=name,
        kind="Diffusion",
        make=lambda: getattr(diffusers, name)(**config),
        inputs=inputs,
        output=lambda out: out.sample,
    )


TIME = torch.tensor([3.0, 7.0])

ROWS = [
    row(
        "SD3Transformer2DModel",
        lambda seed: {
            "hidden_states": noise(2, 4, 8, 8, seed=seed),
            "encoder_hidden_states": noise(2, 5, 32, seed=seed + 1),
            "pooled_projections": noise(2, 48, seed=seed + 2),
            "timestep": TIME,
        },
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=48, out_channels=4,
        pos_embed_max_size=8,
    ),
    row(
        "FluxTransformer2DModel",
        lambda seed: {
            "hidden_states": noise(2, 16, 16, seed=seed),
            "encoder_hidden_states": noise(2, 5, 32, seed=seed + 1),
            "pooled_projections": noise(2, 32, seed=seed + 2),
            "timestep": TIME / 10,
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "txt_ids": torch.zeros(5, 3),
        },
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ),
    row(
        "UNet2DConditionModel",
        lambda seed: {
            "sample": noise(2, 4, 8, 8, seed=seed), "timestep": TIME,
            "encoder_hidden_states": noise(2, 5, 32, seed=seed + 1),
        },
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=16,
    ),
    row(
        "DiTTransformer2DModel",
        lambda seed: {
            "hidden_states": noise(2, 4, 8, 8, seed=seed), "timestep": TIME, "class_labels": torch.tensor([1, 2]),
        },
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=4,
    ),
    row(
        "PixArtTransformer2DModel",
        lambda seed: {
            "hidden_states": noise(2, 4, 8, 8, seed=seed), "encoder_hidden_states": noise(2, 5, 32, seed=seed + 1),
            "timestep": TIME,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=64, caption_channels=32, norm_num_groups=4,
    ),
    row(
        "AutoencoderKL",
        lambda seed: {"sample": noise(2, 3, 16, 16, seed=seed)},
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=16,
    ),
    row(
        "SanaTransformer2DModel",
        lambda seed: {
            "hidden_states": noise(2, 4, 8, 8, seed=seed), "encoder_hidden_states": noise(2, 5, 32, seed=seed + 1),
            "timestep": TIME,
        },
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=16,
        num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=32,
        mlp_ratio=2.0, sample_size=8, patch_size=1,
    ),
    row(
        "WanTransformer3DModel",
        lambda seed: {
            "hidden_states": noise(2, 4, 2, 8, 8, seed=seed), "encoder_hidden_states": noise(2, 5, 32, seed=seed + 1),
            "timestep": TIME,
        },
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=96, num_layers=2, rope_max_seq_len=32,
    ),
]  # fmt: skip
