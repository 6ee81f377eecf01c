"""The model: crops of one tracked object in, its full and visible masks out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from eff_vision.amodal.config import EoRaSConfig
from eff_vision.amodal.encoder import ConvEncoder
from eff_vision.amodal.fusion import MultiViewFusion
from eff_vision.amodal.lift import BEVLift


class AmodalOutput(NamedTuple):
    """What `EoRaS` gives.

    Attributes:
        full: Logits of the full mask, [B, T, 1, m, m].
        visible: Logits of the visible mask, [B, T, 1, m, m].
        slots: After each frame, forwards in time, [B, T, K, d].
    """

    full: Tensor
    visible: Tensor
    slots: Tensor


class MaskDecoder(nn.Module):
    """Three transposed convolutions, each from n to 2 n - 1 rows: 16 to 121 (section 3.4)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(channels, width, 3, 2, 1),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose2d(width, width // 2, 3, 2, 1),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose2d(width // 2, 1, 3, 2, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, 1, 8 (n - 1) + 1, ...] of maps [N, C, n, n]."""
        return self.layers(features)


class EoRaS(nn.Module):
    """Amodal masks of a tracked object through a clip, by slots that read the picture and a bird's-eye view.

    Args:
        config: Settings.
        encoder: Takes pictures [N, 3, crop, crop] to maps [N, config.features, crop / 8, crop / 8]; a small
            convolutional network if None. `FeaturePyramid` makes one of any network of timm.
    """

    def __init__(self, config: EoRaSConfig, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvEncoder(config.features) if encoder is None else encoder
        self.lift = None if config.bev is None else BEVLift(config.features, config.bev)
        self.fusion = MultiViewFusion(config)
        channels = config.d_model * (2 if config.bidirectional else 1)
        self.full, self.visible = (MaskDecoder(channels, config.d_model) for _ in range(2))

    def fuse(
        self, crops: Tensor, intrinsics: Tensor | None, valid: Tensor, tilt: Tensor | None, slots: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Features of each frame, [B, T, d or 2 d, h, h], the half read forwards first; and slots [B, T, K, d]."""
        batch, frames = crops.shape[:2]
        features = self.encoder(crops.flatten(0, 1))
        wanted = (batch * frames, self.config.features, self.config.grid, self.config.grid)
        if tuple(features.shape) != wanted:
            raise ValueError(f"the encoder gave {list(features.shape)}; wanted {list(wanted)}")
        bev = None
        if self.lift is not None and intrinsics is not None:
            turned = None if tilt is None else tilt.expand(batch, frames).flatten()
            bev = self.lift(features, intrinsics.flatten(0, 1), self.config.crop, turned)
        tokens, above = self.fusion.tokens(features, bev)
        tokens = tokens.unflatten(0, (batch, frames))
        above = None if above is None else above.unflatten(0, (batch, frames))
        start = self.fusion.start(batch) if slots is None else slots
        if self.config.bidirectional:  # the clips run backwards are further clips of the same batch
            tokens, valid = (torch.cat((x, x.flip(1))) for x in (tokens, valid))
            above = None if above is None else torch.cat((above, above.flip(1)))
            start = torch.cat((start, self.fusion.start(batch)))
        found, kept = self.fusion.run(tokens, above, valid, start)
        if self.config.bidirectional:
            found, kept = torch.cat((found[:batch], found[batch:].flip(1)), -1), kept[:batch]
        return found.transpose(-2, -1).unflatten(-1, (self.config.grid, self.config.grid)), kept

    def forward(
        self,
        crops: Tensor,
        intrinsics: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        tilt: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> AmodalOutput:
        """Masks of all frames.

        Args:
            crops: Colours from 0 to 1, [B, T, 3, crop, crop].
            intrinsics: Of the crops, in pixels, [B, T, 3, 3] (`adapt_intrinsics_to_crop`). With a bird's-eye view only.
            valid: Which frames are more than padding, [B, T], bool; all if None.
            tilt: How far the cameras look down, radians, [B, T] or a scalar.
            slots: To go on from, [B, K, d]: the last of an earlier part of the same clip.

        Raises:
            ValueError: a shape is wrong, there is no frame, no frame of a clip is valid, or the intrinsics are missing,
                unused or not in pixels.
        """
        c = self.config
        if crops.dim() != 5 or tuple(crops.shape[2:]) != (3, c.crop, c.crop):
            raise ValueError(f"crops must be [B, T, 3, {c.crop}, {c.crop}], got {list(crops.shape)}")
        batch, frames = crops.shape[:2]
        if batch == 0 or frames == 0:
            raise ValueError(f"a clip needs at least one frame, got crops {list(crops.shape)}")
        if (intrinsics is None) != (self.lift is None):
            raise ValueError(
                "the bird's-eye view needs intrinsics"
                if self.lift
                else "intrinsics are only used with a bird's-eye view"
            )
        if intrinsics is not None and tuple(intrinsics.shape) != (batch, frames, 3, 3):
            raise ValueError(f"intrinsics must be [{batch}, {frames}, 3, 3], got {list(intrinsics.shape)}")
        if tilt is not None and self.lift is None:
            raise ValueError("tilt is only used with a bird's-eye view")
        if valid is None:
            valid = torch.ones(batch, frames, dtype=torch.bool, device=crops.device)
        elif valid.dtype != torch.bool or tuple(valid.shape) != (batch, frames):
            raise ValueError(f"valid must be bool [{batch}, {frames}], got {valid.dtype} {list(valid.shape)}")
        if not bool(valid.any(1).all()):
            raise ValueError(f"clip {int((~valid.any(1)).nonzero()[0])} has no valid frame")
        if slots is not None and tuple(slots.shape) != (batch, c.slots, c.d_model):
            raise ValueError(f"slots must be [{batch}, {c.slots}, {c.d_model}], got {list(slots.shape)}")
        # Whatever padding holds, NaN too, is not to reach the shared sums of a backward pass.
        crops = torch.where(valid[:, :, None, None, None], crops, torch.zeros_like(crops))
        fused, kept = self.fuse(crops, intrinsics, valid, tilt, slots)
        flat = fused.flatten(0, 1)
        full, visible = (decoder(flat).unflatten(0, (batch, frames)) for decoder in (self.full, self.visible))
        return AmodalOutput(full, visible, kept)
