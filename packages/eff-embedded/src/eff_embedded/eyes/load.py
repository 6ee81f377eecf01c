"""Loading SmolLM2 with eyes: packages' weights, and the connector and LoRA of the committed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff_embedded.checkpoints import checkpoint as find_checkpoint
from eff_embedded.eyes.parts import PICTURE_TOKEN, EyesConfig, assemble, trained_parameters
from eff_embedded.eyes.prompt import CHAT_TEMPLATE, MEAN, STD

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

SMOLLM2_EYES = "smollm2-eyes-v1"


def checkpoint_file() -> Path:
    """The committed checkpoint, float16 safetensors; `eff_embedded.checkpoints.checkpoint` gives its record too."""
    return find_checkpoint(SMOLLM2_EYES).folder / "model.safetensors"


def load_smollm2_eyes(
    checkpoint: Path | None = None, *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """SmolLM2 with eyes and its processor, of transformers' own classes, in evaluation mode.

    LoRA acts on tokens from a sequence's first picture on, so a sequence without a picture gets SmolLM2's logits bit
    for bit, also when others in the cache of one ``generate`` have pictures. Whoever calls the model with
    ``inputs_embeds`` that pictures were put into already says so by ``behind_picture``, bool [batch, tokens].

    Args:
        checkpoint: A safetensors file of connector and LoRA; None is the committed one.
        dtype: Of the model in memory.
        options: Passed to ``from_pretrained`` of the language model, such as ``attn_implementation``.

    Raises:
        FileNotFoundError: a package with weights, or the checkpoint, is not there.
        ValueError: the checkpoint is of another model.

    Example:
        >>> model, processor = load_smollm2_eyes()
        >>> chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]}]
        >>> text = processor.apply_chat_template(chat, add_generation_prompt=True)
        >>> inputs = processor(images=[picture], text=text, return_tensors="pt")
        >>> processor.decode(model.generate(**inputs, do_sample=False)[0])
    """
    config, weights = read_checkpoint(checkpoint_file() if checkpoint is None else checkpoint)
    model = assemble(config, dtype=dtype, **options)
    fill(model, weights)
    return model, load_processor(config)


def read_checkpoint(path: Path) -> tuple[EyesConfig, dict[str, Tensor]]:
    """Shape and weights of a checkpoint file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    ranks = {tensor.shape[0] for name, tensor in weights.items() if name.endswith(".lora_a")}
    targets = {name.split(".")[-2] for name in weights if name.endswith(".lora_a")}
    if not {"picture_size", "layers"} <= stored.keys() or len(ranks) != 1:
        raise ValueError(f"{path} is not a checkpoint of SmolLM2 with eyes: picture_size, layers or LoRA are missing")
    return (
        EyesConfig(
            picture_size=int(stored["picture_size"]),
            layers=tuple(int(layer) for layer in stored["layers"].split(",")),
            rank=ranks.pop(),
            targets=tuple(sorted(targets)),
        ),
        weights,
    )


@torch.no_grad()
def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put connector and LoRA into an assembled model.

    Raises:
        ValueError: names or shapes do not fit.
    """
    wanted = trained_parameters(model)
    if wanted.keys() != weights.keys():
        raise ValueError(
            f"the checkpoint's names differ from the model's: {sorted(wanted.keys() ^ weights.keys())[:4]}"
        )
    for name, parameter in wanted.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{name} has shape {list(weights[name].shape)}, the model wants {list(parameter.shape)}")
        parameter.copy_(weights[name])


def load_processor(config: EyesConfig) -> LlavaProcessor:
    """Tokenizer, chat template and picture preparation as one processor of transformers."""
    from transformers import AutoTokenizer, BitImageProcessorPil, LlavaProcessor

    from eff_embedded.language import smollm2_folder

    size = {"height": config.picture_size, "width": config.picture_size}
    return LlavaProcessor(
        image_processor=BitImageProcessorPil(
            size=size, crop_size=size, do_center_crop=False, resample=3, image_mean=list(MEAN), image_std=list(STD)
        ),
        tokenizer=AutoTokenizer.from_pretrained(smollm2_folder()),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=PICTURE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
