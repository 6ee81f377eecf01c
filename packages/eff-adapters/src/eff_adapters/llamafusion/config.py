"""Settings of a picture tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityTowerConfig(Settings):
    """What a picture tower is made of, and how it is trained.

    Attributes:
        boi_token_id: Token that opens a picture. It and ``eoi_token_id`` may lie beyond the model's vocabulary; within
            it, two ids that texts never use.
        eoi_token_id: Token that closes a picture.
        separation: Which weights picture tokens have for themselves: "deep" (norms, projections of attention, feed
            forward), "shallow" (norms and feed forward), or "none" (dense fine-tuning of the text weights).
        first_layer: The layers before it have no weights of pictures: picture tokens go through those of text there.
        image_rank: Keep the linear layers of pictures as additions of this rank to those of text; None for copies.
        patchify: How latents become tokens: "unet" (two blocks of a U-Net) or "linear" (one linear layer a patch).
        unet_channels: Channels of the U-Net at the latents' and at the tokens' resolution.
        latent_channels: Channels of a picture's latents.
        latent_size: Height and width of the latents.
        tokens_per_image: Tokens of one picture, a square number; ``latent_size`` is a multiple of its root.
        prediction: What the head's output is and the loss compares: "noise" (DDPM), "velocity", sqrt(abar) noise -
            sqrt(1 - abar) latents (arXiv 2202.00512), to which the noised latents add what is known of the noise, or
            "sample", the latents without noise: noise fills a patch, and a token with fewer numbers than its patch
            cannot carry it, but can carry a picture (arXiv 2511.13720). In each case `ModalityOutput.noise_pred` and
            sampling are of the noise.
        token_gain: Factor of the tokens that enter the decoder. What a deep model adds to its residual stream drowns
            tokens of size 1; a size near that of the stream at its end, 30 in SmolLM2-135M, keeps them readable there.
        loss_lambda: Weight of the diffusion loss beside that of language (Transfusion, arXiv 2408.11039).
        text_lr_ratio: Learning rate of the text weights over that of the picture weights; at 0 they are frozen.
        num_train_timesteps: Steps of the cosine noise schedule.
        max_t_when_image_first: Largest time step in training for a picture that comes before its text.
        caption_dropout: Chance that `pack` leaves the text before a picture out, for guidance without a classifier.
    """

    tags: ClassVar[Mapping[str, str]] = {"method": "llamafusion"}

    boi_token_id: int
    eoi_token_id: int
    separation: Literal["deep", "shallow", "none"] = "deep"
    first_layer: int = 0
    image_rank: int | None = None
    patchify: Literal["unet", "linear"] = "unet"
    unet_channels: tuple[int, int] = (320, 1280)
    latent_channels: int = 8
    latent_size: int = 32
    tokens_per_image: int = 256
    prediction: Literal["noise", "velocity", "sample"] = "noise"
    token_gain: float = 1.0
    loss_lambda: float = 5.0
    text_lr_ratio: float = 0.0
    num_train_timesteps: int = 1000
    max_t_when_image_first: int = 500
    caption_dropout: float = 0.1

    def check(self) -> None:
        """Refuse numbers out of range, and latents that do not divide into tokens."""
        if min(self.boi_token_id, self.eoi_token_id) < 0 or self.boi_token_id == self.eoi_token_id:
            raise ValueError(
                f"boi_token_id={self.boi_token_id}, eoi_token_id={self.eoi_token_id}; use two ids of 0 or more"
            )
        for name in ("latent_channels", "latent_size", "tokens_per_image", "num_train_timesteps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 1 or more")
        if self.image_rank is not None and (self.image_rank < 1 or self.separation == "none"):
            raise ValueError(f"image_rank={self.image_rank}; use 1 or more, with separation 'deep' or 'shallow'")
        side = math.isqrt(self.tokens_per_image)
        if side * side != self.tokens_per_image or self.latent_size % side:
            raise ValueError(
                f"tokens_per_image={self.tokens_per_image} must be the square of a divisor of "
                f"latent_size={self.latent_size}"
            )
        if self.patchify == "unet" and self.patch not in (1, 2):
            raise ValueError(
                f"a U-Net halves latents once or not at all; latent_size={self.latent_size} over a side of {side} "
                "tokens is another ratio, use patchify='linear'"
            )
        if any(c < 4 or c % 4 for c in self.unet_channels):
            raise ValueError(f"unet_channels={self.unet_channels}; use multiples of 4")
        if self.loss_lambda < 0 or self.text_lr_ratio < 0:
            raise ValueError(f"loss_lambda={self.loss_lambda}, text_lr_ratio={self.text_lr_ratio}; use 0 or more")
        if self.first_layer < 0:
            raise ValueError(f"first_layer={self.first_layer}; use 0 or more")
        if not 0 < self.token_gain < math.inf:
            raise ValueError(f"token_gain={self.token_gain}; use a number above 0")
        if not self.max_t_when_image_first >= 0:
            raise ValueError(f"max_t_when_image_first={self.max_t_when_image_first}; use 0 or more")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout}; use a chance from 0 to 1")

    @property
    def side(self) -> int:
        """Rows, and columns, of a picture's tokens."""
        return math.isqrt(self.tokens_per_image)

    @property
    def patch(self) -> int:
        """Rows, and columns, of latents in one token."""
        return self.latent_size // self.side

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one picture's latents."""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def trains_text(self) -> bool:
        """Whether text weights change in training."""
        return self.text_lr_ratio > 0
