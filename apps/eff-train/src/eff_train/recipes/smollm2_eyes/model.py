"""The module in training: frozen SmolLM2 and ViT, the connector on standardised features, LoRA in float32."""

from __future__ import annotations

from typing import Any

import torch
from eff_embedded import collages
from eff_embedded.eyes.parts import EyesConfig, assemble
from torch import Tensor, nn
from torch.nn import functional as F

from eff_train.recipes.smollm2_eyes.data import config_of, picture_batch


class EyesInTraining(nn.Module):
    """All parts; what is trained is float32, the rest bfloat16 and frozen.

    The connector sees features less their mean, over their deviation, since some of the ViT's numbers are a hundred
    times as large as others; `connector_weights` folds that into the weights of the plain connector.

    Args:
        config: Shape of the model.
        dtype: Of the frozen weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: EyesConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.llava = assemble(config, dtype=dtype).requires_grad_(False)
        for name, parameter in self.llava.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        width = self.language.config.hidden_size
        self.linear_1 = nn.Linear(384 * len(config.layers), width)
        self.linear_2 = nn.Linear(width, width)
        with torch.no_grad():
            features = self.features(_some_pictures(config.picture_size)).flatten(0, 1)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", features.std(0).clamp(min=1e-3))

    @property
    def language(self) -> Any:
        """SmolLM2's layers."""
        return self.llava.model.language_model

    def features(self, pixels: Tensor) -> Tensor:
        """Features of the patches, float32 [batch, patches, 384 * layers]."""
        tower: Any = self.llava.model.vision_tower
        with torch.no_grad():
            states = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states
        return torch.cat([states[i][:, 1:].float() for i in self.config.layers], -1)

    def connect(self, features: Tensor) -> Tensor:
        """Features to embeddings, float32 [batch, patches, hidden]."""
        x = (features - self.mean) / self.deviation
        return self.linear_2(F.gelu(self.linear_1(x)))

    def connector_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The connector for features as they are, in a narrower type; the bias makes up for the weight's rounding."""
        w = (self.linear_1.weight / self.deviation).to(dtype)
        plain = {
            "linear_1.weight": w,
            "linear_1.bias": (self.linear_1.bias - w.float() @ self.mean).to(dtype),
            "linear_2.weight": self.linear_2.weight.to(dtype),
            "linear_2.bias": self.linear_2.bias.to(dtype),
        }
        return {f"model.multi_modal_projector.{n}": t.detach().contiguous() for n, t in plain.items()}

    def trained(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Connector and LoRA by their names in the LLaVA model."""
        lora = {n: p.detach().to(dtype) for n, p in self.llava.named_parameters() if ".lora_" in n}
        return {**self.connector_weights(dtype), **lora}


def word_embeddings(tokenizer: Any, table: Tensor) -> Tensor:
    """Embedding of each object's name, the mean of its tokens, and of "background": float32 [names + 1, hidden]."""
    words = [*collages.things(), "background"]
    ids = [tokenizer(" " + word, add_special_tokens=False).input_ids for word in words]
    return torch.stack([table[i].float().mean(0) for i in ids])


def patch_loss(seen: Tensor, names: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """How far embeddings [batch, patches, hidden] are from the word of what the patch shows, and the share of nearest.

    Cross-entropy over cosines, so that words are told apart, and the squared distance, so that the length fits too.
    """
    known = names >= 0
    x, y = seen[known], names[known]
    logits = 20 * F.normalize(x, dim=-1) @ F.normalize(words, dim=-1).T
    ground = len(words) - 1
    weight = torch.where(y == ground, 0.1, 1.0)
    entropy = (F.cross_entropy(logits, y, reduction="none") * weight).sum() / weight.sum()
    distance = (x - words[y]).pow(2).sum(-1) / words.pow(2).sum(-1).mean()
    hit = (logits.argmax(-1) == y)[y < ground].float().mean()
    return entropy + (distance * weight).sum() / weight.sum(), hit


def _some_pictures(size: int) -> Tensor:
    import numpy as np

    rng = np.random.default_rng(0)
    return picture_batch([collages.sample(10**9 + i, config_of(rng, 0.4)) for i in range(64)], size)
