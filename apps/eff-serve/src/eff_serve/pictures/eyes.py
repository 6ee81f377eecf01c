"""What a model sees with: pictures to the embeddings that stand in the prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from eff_serve.names import EYES
from eff_serve.pictures.prompt import LowRank, PromptPictures

if TYPE_CHECKING:
    from eff_kernels.edit.attention import AttentionCall, AttentionOutput
    from PIL.Image import Image
    from torch import Tensor, nn

    from eff_serve.engine.decoder import Decoder


class Eyes:
    """Makes embeddings of pictures, one request at a time.

    Args:
        encode: Pictures to embeddings, float32 [pictures, tokens, hidden].
        token: The id that marks a picture's places in a prompt.
        tokens: Tokens of one picture.
        saliency: What the tower's class token attended to in the last call of ``encode``, see `PromptPictures`.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Image]], Tensor],
        token: int,
        tokens: int,
        saliency: Callable[[], Tensor] | None = None,
    ) -> None:
        self._encode, self.token, self.tokens, self._saliency = encode, token, tokens, saliency
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
            saliency = None if self._saliency is None else self._saliency()
        return PromptPictures(places, seen.flatten(0, 1), saliency)


class TowerSaliency:
    """Notes what the class token of a vision tower attends to, in its first layer and its last but one.

    Args:
        tower: The tower, with one class token before its patches; looked at as long as it lives.
    """

    def __init__(self, tower: nn.Module) -> None:
        from eff_kernels.edit.attention import find_attention, observe_attention

        names = [found.name for found in find_attention(tower) if found.way]
        self._places = {names[0]: 0, names[-2]: 1}
        self._last: dict[int, Tensor] = {}
        observe_attention(tower, self._note, where=list(self._places))

    def _note(self, call: AttentionCall, output: AttentionOutput) -> None:
        from eff_kernels.edit.attention import rows

        self._last[self._places[call.name]] = rows(call, [0]).sum(1)[:, 0, 1:]

    def __call__(self) -> Tensor:
        """Of the last pictures, float32 [2, pictures, patches]."""
        return torch.stack([self._last[0], self._last[1]])


def open_eyes(decoder: Decoder) -> Eyes:
    """Give the embedded model's decoder its LoRA for what stands behind pictures; returns what makes embeddings.

    Raises:
        ValueError: a package that eyes need is not installed.
    """
    try:
        from eff_embedded.eyes import PICTURE_TOKEN_ID, PictureEncoder, checkpoint_file, read_checkpoint
        from eff_embedded.vision import load_vit

        config, weights = read_checkpoint(checkpoint_file())
        vision = load_vit()
        encoder = PictureEncoder(config, weights, vision)
        saliency = TowerSaliency(vision)
    except ImportError as error:
        raise ValueError(
            f"{EYES} needs packages that are missing, pip install 'eff-serve[pictures]': {error}"
        ) from error
    c = decoder.config
    head = "model.language_model.layers."
    lora = {
        n.removeprefix(head).replace(".self_attn", "").replace(".mlp", ""): w for n, w in weights.items() if "lora" in n
    }
    sizes = {name: outputs for name, (outputs, _) in c.projections.items()}
    decoder.behind_pictures = LowRank.from_weights(lora, c.num_layers, sizes)
    decoder.steerer.measure()
    return Eyes(encoder, PICTURE_TOKEN_ID, config.picture_tokens, saliency)
