"""The LLaVA model of SmolLM2 and the ViT, put together from the packages' weights, with a connector to be filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eff_embedded.eyes.lora import add_lora, watch_pictures

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

PICTURE_TOKEN = "<empty_output>"
"""A special token of SmolLM2 that chats have no use for; it marks the places of a picture's patches."""
PICTURE_TOKEN_ID = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class EyesConfig:
    """Shape of SmolLM2 with eyes.

    Attributes:
        picture_size: Height and width in pixels that the ViT sees; a multiple of its patch of 14.
        layers: Layers of the ViT whose outputs the connector reads, side by side.
        rank: Rank of the LoRA.
        targets: Projections of each layer of SmolLM2 that have one.
    """

    picture_size: int = 126
    layers: tuple[int, ...] = (6, 8, 10)
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")

    def __post_init__(self) -> None:
        if self.picture_size < 14 or self.picture_size % 14:
            raise ValueError(f"picture_size={self.picture_size} must be a multiple of 14, the ViT's patch")
        if not self.layers or not all(1 <= layer <= 12 for layer in self.layers):
            raise ValueError(f"layers={self.layers} must name layers of the ViT from 1 to 12")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be 1 or more")

    @property
    def picture_tokens(self) -> int:
        """Tokens of one picture: its patches."""
        return (self.picture_size // 14) ** 2


def assemble(
    config: EyesConfig, *, dtype: torch.dtype = torch.float32, **options: Any
) -> LlavaForConditionalGeneration:
    """SmolLM2 and the ViT in transformers' LLaVA class, in evaluation mode; connector and LoRA untrained.

    Args:
        config: Layers, sizes, LoRA.
        dtype: Of all weights.
        options: Passed on for the language model, such as ``attn_implementation``.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from eff_embedded.language import load_smollm2
    from eff_embedded.vision import load_vit

    language, _ = load_smollm2(dtype=dtype, **options)
    vision = load_vit(dtype=dtype)
    llava_config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=PICTURE_TOKEN_ID,
        vision_feature_layer=list(config.layers),
        vision_feature_select_strategy="default",
        image_seq_length=config.picture_tokens,
        tie_word_embeddings=True,
    )
    with torch.device("meta"), _no_init():
        model = LlavaForConditionalGeneration(llava_config)
    model.model.language_model, model.lm_head, model.model.vision_tower = language.model, language.lm_head, vision
    model.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        linear.reset_parameters()
    model.generation_config = language.generation_config
    add_lora(language.model, config.targets, config.rank)
    watch_pictures(model.model)
    return model.eval()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The connector and the LoRA by name: what the checkpoint holds."""
    return {n: p for n, p in model.named_parameters() if ".lora_" in n or ".multi_modal_projector." in n}


def _no_init() -> Any:
    from transformers.initialization import no_init_weights

    return no_init_weights()
