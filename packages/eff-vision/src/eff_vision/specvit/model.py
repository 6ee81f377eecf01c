"""The network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eff_vision.specvit.config import LolaSpecViTConfig
from eff_vision.specvit.layers import (
    BandDropout,
    PublishedSwiGLU,
    SqueezeExcite,
    SwiGLU,
    WindowAttention,
    drop_path,
    linear,
)
from eff_vision.specvit.lora import LoraLinear


class Stem(nn.Module):
    """Three convolutions over bands, rows and columns, then the mean over bands: [B, bands, P, P] to [B, C, P, P]."""

    def __init__(self, channels: tuple[int, int, int], band_dropout: float) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for (inside, outside), bands in zip(zip((1, *channels), channels, strict=False), (7, 5, 3), strict=True):
            kernel = (bands, 3, 3)
            padding = (bands // 2, 1, 1)
            parts += [nn.Conv3d(inside, outside, kernel, padding=padding), nn.BatchNorm3d(outside), nn.SiLU()]
        self.layers = nn.Sequential(*parts, BandDropout(band_dropout))
        self.excite = SqueezeExcite(channels[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        return self.excite(self.layers(x[:, None])).mean(2)


class Block(nn.Module):
    """Window attention and SwiGLU, each with its norm in front."""

    def __init__(self, config: LolaSpecViTConfig, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.norm1, self.attention = nn.LayerNorm(dim), WindowAttention(config, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = PublishedSwiGLU(config, dim) if config.paper_compat else SwiGLU(config, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps [B, H, W, C]."""
        x = x + drop_path(self.attention(self.norm1(x)), self.drop, training=self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop, training=self.training)


class Downsample(nn.Module):
    """Half the grid, the next width: maps [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), C']."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False), nn.SiLU(), SqueezeExcite(inside)
        )
        self.widen = nn.Sequential(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.halve = nn.Conv2d(outside, outside, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        return self.halve(self.widen(self.mix(x.movedim(-1, 1)))).movedim(1, -1)


class LolaSpecViT(nn.Module):
    """Classifies the pixel in the middle of a patch [B, bands, P, P].

    Args:
        config: Settings.
    """

    def __init__(self, config: LolaSpecViTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.stem = Stem(c.stem, c.band_dropout)
        self.embed = nn.Sequential(nn.Conv2d(c.dims[0], c.dims[0], 4, 2, 1), nn.BatchNorm2d(c.dims[0]), nn.SiLU())
        grid = (c.patch_size - 2) // 2 + 1
        self.position = nn.Parameter(torch.randn(1, grid, grid, c.dims[0]) * 0.02)
        self.dropout = nn.Dropout(c.dropout)
        drops = [c.drop_path * i / max(1, sum(c.depths) - 1) for i in range(sum(c.depths))]
        self.stages = nn.ModuleList()
        self.between = nn.ModuleList()
        for i, (dim, depth, heads) in enumerate(zip(c.dims, c.depths, c.heads, strict=True)):
            if i:
                self.between.append(Downsample(c.dims[i - 1], dim))
            self.stages.append(nn.Sequential(*(Block(c, dim, heads, drops.pop(0)) for _ in range(depth))))
        self.norm = nn.LayerNorm(c.dims[-1])
        self.head = linear(c, "head", c.dims[-1], c.num_classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits [B, num_classes].

        Raises:
            ValueError: the patches have another number of bands or another size than the settings say, or NaN.
        """
        c = self.config
        if patches.shape[1:] != (c.in_bands, c.patch_size, c.patch_size):
            wanted = f"[B, {c.in_bands}, {c.patch_size}, {c.patch_size}]"
            raise ValueError(f"patches must be {wanted}, got {list(patches.shape)}")
        x = self.embed(self.stem(patches)).movedim(1, -1)
        x = self.dropout(x + self.position)
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.between[i - 1](x))
        return self.head(self.norm(x).flatten(1, 2).mean(1))

    def lora_layers(self) -> list[LoraLinear]:
        """All layers with an adapter."""
        return [m for m in self.modules() if isinstance(m, LoraLinear)]

    def freeze_base(self) -> None:
        """Train adapters, head and the affine part of batch norms alone; the norms' statistics stay as they are.

        Raises:
            ValueError: the model has no adapters.
        """
        if not any("lora_" in n for n, _ in self.named_parameters()):
            raise ValueError("the model has no adapters: lora_rank is 0")
        norms = (nn.BatchNorm2d, nn.BatchNorm3d)
        affine = {id(p) for m in self.modules() if isinstance(m, norms) for p in m.parameters()}
        for name, p in self.named_parameters():
            p.requires_grad_("lora_" in name or name.startswith("head.") or id(p) in affine)
        for m in self.modules():
            if isinstance(m, norms):
                m.momentum = 0.0  # the statistics would move in train mode even without gradients

    def merge_adapters_(self) -> int:
        """Add all adapters to their weights; returns how many there were."""
        layers = [m for m in self.lora_layers() if not m.merged]
        for layer in layers:
            layer.merge_()
        return len(layers)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """What differs between scenes: adapters, head and batch norms."""
        kept = ("lora_", "head.", "running_", "num_batches")
        norms = {n for n, m in self.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)}
        return {
            k: v.detach().clone()
            for k, v in self.state_dict().items()
            if any(x in k for x in kept) or k.rpartition(".")[0] in norms
        }

    def set_strength(self, strength: float) -> None:
        """Strength of all adapters in training."""
        for layer in self.lora_layers():
            layer.strength = strength
