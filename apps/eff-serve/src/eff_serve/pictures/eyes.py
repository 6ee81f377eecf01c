"""What a model sees with: pictures to the embeddings that stand in the prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from eff_serve.names import EYES
from eff_serve.pictures.prompt import LowRank, PromptPictures

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from eff_serve.engine.decoder import Decoder


class Eyes:
    """Makes embeddings of pictures, one request at a time.

    Args:
        encode: Pictures to embeddings, float32 [pictures, tokens, hidden].
        token: The id that marks a picture's places in a prompt.
        tokens: Tokens of one picture.
    """

    def __init__(self, encode: Callable[[Sequence[Image]], Tensor], token: int, tokens: int) -> None:
        self._encode, self.token, self.tokens = encode, token, tokens
        self._lock = threading.Lock()

    @property
    def places(self) -> tuple[int, ...]:
        """Token ids of one picture in a prompt."""
        return (self.token,) * self.tokens

    def look(self, prompt: Sequence[int], pictures: Sequence[Image]) -> PromptPictures:
        """Embeddings of pictures for a prompt that has a place for each, in its order.

        Raises:
            ValueError: the prompt has room for another number of pictures.
        """
        places = (torch.tensor(prompt) == self.token).nonzero().flatten()
        if places.numel() != self.tokens * len(pictures):
            raise ValueError(
                f"the prompt has {places.numel()} places of pictures, {len(pictures)} pictures need "
                f"{self.tokens * len(pictures)}"
            )
        with self._lock:
            seen = self._encode(pictures)
        return PromptPictures(places, seen.flatten(0, 1))


def open_eyes(decoder: Decoder) -> Eyes:
    """Give the embedded model's decoder its LoRA for what stands behind pictures; returns what makes embeddings.

    Raises:
        ValueError: a package that eyes need is not installed.
    """
    try:
        from eff_embedded.eyes import PICTURE_TOKEN_ID, PictureEncoder, checkpoint_file, read_checkpoint

        config, weights = read_checkpoint(checkpoint_file())
        encoder = PictureEncoder(config, weights)
    except ImportError as error:
        raise ValueError(
            f"{EYES} needs packages that are missing, pip install 'eff-serve[pictures]': {error}"
        ) from error
    c = decoder.config
    head = "model.language_model.layers."
    lora = {
        n.removeprefix(head).replace(".self_attn", "").replace(".mlp", ""): w for n, w in weights.items() if "lora" in n
    }
    sizes = {"q_proj": c.num_heads * c.head_dim, "gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
    sizes |= dict.fromkeys(("k_proj", "v_proj"), c.num_kv_heads * c.head_dim)
    decoder.behind_pictures = LowRank.from_weights(lora, c.num_layers, sizes)
    return Eyes(encoder, PICTURE_TOKEN_ID, config.picture_tokens)
