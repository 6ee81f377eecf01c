"""From noised latents to tokens and from hidden states to predicted noise; both know the time step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from eff_adapters.llamafusion.config import ModalityTowerConfig


class Tokens(NamedTuple):
    """Tokens [n, tokens, hidden] of pictures, and what the way back needs besides them."""

    tokens: Tensor
    skips: tuple[Tensor, ...]


def make_head(config: ModalityTowerConfig, hidden: int) -> nn.Module:
    """The head that a config asks for."""
    return UNetHead(config, hidden) if config.patchify == "unet" else LinearHead(config, hidden)


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time step through two linear layers."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.second = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        """[n] to [n, out]."""
        half = self.width // 2
        speeds = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angles = t[:, None].float() * speeds
        waves = torch.cat([angles.sin(), angles.cos()], 1).to(self.first.weight.dtype)
        return self.second(functional.silu(self.first(waves)))


class LinearHead(nn.Module):
    """One linear layer from a patch of latents to a token, one back; time step and place are added to each token.

    The place: text weights know where a token stands among others, not where a patch lies in its picture.
    """

    def __init__(self, config: ModalityTowerConfig, hidden: int) -> None:
        super().__init__()
        self.patch, self.side, self.gain = config.patch, config.side, config.token_gain
        size = config.latent_channels * self.patch**2
        self.inward, self.outward = nn.Linear(size, hidden), nn.Linear(hidden, size)
        self.time = TimeEmbedding(min(256, 2 * (hidden // 2)), hidden)
        self.place = nn.Parameter(0.3 * torch.randn(config.tokens_per_image, hidden))

    def read(self, latents: Tensor, t: Tensor) -> Tokens:
        """Patches row by row."""
        patches = functional.pixel_unshuffle(latents.to(self.inward.weight.dtype), self.patch)
        tokens = self.inward(patches.flatten(2).transpose(1, 2))
        return Tokens(self.gain * (tokens + self.time(t)[:, None] + self.place), ())

    def write(self, hidden: Tensor, skips: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """The inverse order."""
        patches = self.outward(hidden).transpose(1, 2).unflatten(2, (self.side, self.side))
        return functional.pixel_shuffle(patches, self.patch)


class UNetHead(nn.Module):
    """Two blocks of a U-Net before the language model, and two with skip connections behind it."""

    def __init__(self, config: ModalityTowerConfig, hidden: int) -> None:
        super().__init__()
        fine, coarse = config.unet_channels
        self.side, self.halve, self.gain = config.side, config.patch == 2, config.token_gain
        width = 4 * fine
        self.time = TimeEmbedding(fine, width)
        self.conv_in = nn.Conv2d(config.latent_channels, fine, 3, padding=1)
        self.down = nn.ModuleList([ResBlock(fine, fine, width), ResBlock(fine, coarse, width)])
        self.shrink = nn.Conv2d(fine, fine, 3, stride=2 if self.halve else 1, padding=1)
        self.look = nn.ModuleList([SpatialAttention(coarse), SpatialAttention(coarse)])
        self.to_model, self.from_model = nn.Conv2d(coarse, hidden, 1), nn.Conv2d(hidden, coarse, 1)
        self.up = nn.ModuleList([ResBlock(2 * coarse, coarse, width), ResBlock(coarse + fine, fine, width)])
        self.grow = nn.Conv2d(coarse, coarse, 3, padding=1)
        self.norm_out, self.conv_out = _norm(fine), nn.Conv2d(fine, config.latent_channels, 3, padding=1)

    def read(self, latents: Tensor, t: Tensor) -> Tokens:
        """Tokens row by row; the skips are at the latents' and at the tokens' resolution."""
        time = self.time(t)
        fine = self.down[0](self.conv_in(latents.to(self.conv_in.weight.dtype)), time)
        coarse = self.look[0](self.down[1](self.shrink(fine), time))
        return Tokens(self.gain * self.to_model(coarse).flatten(2).transpose(1, 2), (fine, coarse))

    def write(self, hidden: Tensor, skips: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """Hidden states and skips to noise."""
        fine, coarse = skips
        time = self.time(t)
        x = self.from_model(hidden.transpose(1, 2).unflatten(2, (self.side, self.side)))
        x = self.look[1](self.up[0](torch.cat([x, coarse], 1), time))
        if self.halve:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.up[1](torch.cat([self.grow(x), fine], 1), time)
        return self.conv_out(functional.silu(self.norm_out(x)))


class ResBlock(nn.Module):
    """Two convolutions with the time step in between, beside a way straight through."""

    def __init__(self, inside: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inside), nn.Conv2d(inside, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.straight = nn.Identity() if inside == out else nn.Conv2d(inside, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[n, inside, h, w] and [n, time] to [n, out, h, w]."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.time(functional.silu(time))[:, :, None, None]
        return self.straight(x) + self.conv2(functional.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """Self-attention over all places of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        while channels % self.heads:
            self.heads -= 1
        self.norm = _norm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, h, w] to the same."""
        flat = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(flat).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(seen).transpose(1, 2).unflatten(2, x.shape[2:])


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)
