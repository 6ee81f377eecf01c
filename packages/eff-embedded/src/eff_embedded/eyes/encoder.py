"""The eyes alone: pictures to embeddings, for an engine that runs the language model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from eff_embedded.eyes.parts import EyesConfig
from eff_embedded.eyes.prompt import pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Dinov2Model

_CONNECTOR = "model.multi_modal_projector."


class PictureEncoder:
    """ViT and connector of SmolLM2 with eyes.

    Args:
        config: Shape of the model.
        weights: A checkpoint's tensors, see `eff_embedded.eyes.read_checkpoint`.
        vision: The ViT; None loads it.
        dtype: Of the ViT's arithmetic; the connector works in float32.
    """

    def __init__(
        self,
        config: EyesConfig,
        weights: dict[str, Tensor],
        vision: Dinov2Model | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if vision is None:
            from eff_embedded.vision import load_vit

            vision = load_vit(dtype=dtype)
        self.config, self._vision = config, vision
        self._connector = {n.removeprefix(_CONNECTOR): t.float() for n, t in weights.items() if _CONNECTOR in n}

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image]) -> Tensor:
        """Embeddings of the patches of each picture, row by row: float32 [pictures, tokens, hidden]."""
        seen = torch.stack([pixels(picture, self.config.picture_size) for picture in pictures])
        states = self._vision(seen.to(self._vision.dtype), output_hidden_states=True).hidden_states
        features = torch.cat([states[layer][:, 1:].float() for layer in self.config.layers], -1)
        w = self._connector
        inner = functional.gelu(functional.linear(features, w["linear_1.weight"], w["linear_1.bias"]))
        return functional.linear(inner, w["linear_2.weight"], w["linear_2.bias"])
