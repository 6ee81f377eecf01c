"""Patches of each view, and the blocks that look at one view and at all views in turn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_vision.multiview.blocks import Block, rope_table
from eff_vision.multiview.config import MultiViewConfig

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvPatches(nn.Module):
    """Patches by two convolutions, the second without overlap: [N, 3, H, W] to [N, H W / patch^2, dim]."""

    def __init__(self, config: MultiViewConfig) -> None:
        super().__init__()
        rest = config.patch_size // 4
        self.first = nn.Conv2d(3, config.dim, 4, 4)
        self.second = nn.Conv2d(config.dim, config.dim, rest, rest)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, pictures: Tensor) -> Tensor:
        """Tokens of normalised pictures."""
        return self.norm(self.second(F.gelu(self.first(pictures))).flatten(2).mT)


class ViTPatches(nn.Module):
    """Patches by a vision transformer of DINOv2's shape with registers."""

    def __init__(self, config: MultiViewConfig) -> None:
        super().__init__()
        c = config
        self.proj = nn.Conv2d(3, c.dim, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, c.encoder_registers, c.dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + c.encoder_grid**2, c.dim) * 0.02)
        self.blocks = nn.ModuleList(
            Block(c.dim, c.heads, qk_norm=False, layer_scale=1.0) for _ in range(c.encoder_depth)
        )
        self.norm = nn.LayerNorm(c.dim)
        self.grid = c.encoder_grid

    def forward(self, pictures: Tensor) -> Tensor:
        """Tokens of normalised pictures, without those of class and registers."""
        found = self.proj(pictures)
        codes = self.pos_embed[:, 1:].mT.unflatten(-1, (self.grid, self.grid))
        if tuple(found.shape[-2:]) != (self.grid, self.grid):
            codes = F.interpolate(codes.float(), size=found.shape[-2:], mode="bicubic", antialias=True).to(found.dtype)
        x = (found + codes).flatten(2).mT
        n = len(x)
        special = torch.cat((self.cls_token + self.pos_embed[:, :1], self.register_tokens), 1).expand(n, -1, -1)
        x = torch.cat((special, x), 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, special.size(1) :]


class Aggregator(nn.Module):
    """Tokens of all views after the pairs of blocks that the heads read (VGGT, section 3.2).

    Only those are kept in memory.

    Args:
        config: Settings.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: MultiViewConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = ViTPatches(c) if c.encoder == "vit" else ConvPatches(c)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                Block(c.dim, c.heads, qk_norm=c.qk_norm, layer_scale=c.layer_scale) for _ in range(c.depth)
            )

        self.frame_blocks, self.global_blocks = blocks(), blocks()
        # One set for the first view, whose camera is the world, and one for all others.
        self.camera_token = nn.Parameter(torch.randn(2, 1, c.dim) * 0.02)
        self.register_token = nn.Parameter(torch.randn(2, c.registers, c.dim) * 0.02)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_STD)[:, None, None], persistent=False)

    @property
    def special(self) -> int:
        """Tokens of a view in front of its patches."""
        return 1 + self.config.registers

    def forward(self, images: Tensor) -> Mapping[int, Tensor]:
        """By tap (and the last pair): tokens [B, S, special + patches, 2 dim], frame and global side by side.

        Args:
            images: Colours from 0 to 1, [B, S, 3, H, W].
        """
        c = self.config
        batch, views = images.shape[:2]
        grid = (images.size(-2) // c.patch_size, images.size(-1) // c.patch_size)
        patches = self.patch_embed(((images - self.mean) / self.std).flatten(0, 1))
        own = torch.cat((self.camera_token, self.register_token), 1)
        own = torch.cat((own[:1], own[1:].expand(views - 1, -1, -1))).repeat(batch, 1, 1)
        x = torch.cat((own.to(patches.dtype), patches), 1)
        rope = rope_table(self._positions(grid, x.device), c.dim // c.heads, c.rope_base)
        everywhere = tuple(t.repeat(views, 1) for t in rope)
        kept = {}
        for i, (frame, everything) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            x = frame(x, rope)
            alone = x
            x = everything(x.unflatten(0, (batch, views)).flatten(1, 2), (everywhere[0], everywhere[1]))
            x = x.unflatten(1, (views, -1)).flatten(0, 1)
            if i in c.taps or i == c.depth - 1:
                kept[i] = torch.cat((alone, x), -1).unflatten(0, (batch, views))
        return kept

    def _positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(row, column) of each token, [N, 2]: patches count from 1, special tokens stand at 0."""
        rows, columns = (torch.arange(1, n + 1, device=device) for n in grid)
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        return torch.cat((places.new_zeros(self.special, 2), places))
