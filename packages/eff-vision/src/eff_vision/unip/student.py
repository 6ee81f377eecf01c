"""A small vision transformer as UNIP trains it: fixed sine positions, and its own number of heads in the last block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels.edit import Settings
from torch import Tensor, nn

from eff_vision.positions import sine_position


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig(Settings):
    """Sizes of `StudentViT`; the defaults are ViT-S/16 with a teacher of 16 heads.

    Attributes:
        dim: Width.
        depth: Blocks.
        num_heads: Heads of all blocks but the last.
        last_heads: Heads of the last block: the teacher's number.
        patch_size: Pixels of a patch.
        channels: Of the pictures.
        mlp_ratio: Width of the MLP over ``dim``.
        drop_path: Probability of leaving out a branch, the same in all blocks.
    """

    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    last_heads: int = 16
    patch_size: int = 16
    channels: int = 3
    mlp_ratio: float = 4.0
    drop_path: float = 0.1

    def check(self) -> None:
        """Heads divide the width."""
        for name in ("dim", "depth", "num_heads", "last_heads", "patch_size", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("num_heads", "last_heads"):
            if self.dim % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} does not divide dim={self.dim}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be from 0 to below 1, got {self.drop_path}")


class Attention(nn.Module):
    """Self-attention with query, key and value in one projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among tokens [B, N, dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each with its norm in front; whole branches are dropped at random in training."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        hidden = int(dim * mlp_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        x = x + self._maybe(self.attn(self.norm1(x)))
        return x + self._maybe(self.mlp(self.norm2(x)))

    def _maybe(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep


class StudentViT(nn.Module):
    """A plain vision transformer with a class token; pictures of any size that the patch size divides."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(c.channels, c.dim, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.dim) * 0.02)
        heads = [c.num_heads] * (c.depth - 1) + [c.last_heads]
        self.blocks = nn.ModuleList(Block(c.dim, h, c.mlp_ratio, c.drop_path) for h in heads)
        self.apply(_initialise)

    def forward(self, pictures: Tensor) -> Tensor:
        """Tokens [B, 1 + N, dim] after the last block, without a final norm; the class token comes first.

        Raises:
            ValueError: the patch size does not divide the picture.
        """
        return self.states(pictures)[-1]

    def states(self, pictures: Tensor) -> list[Tensor]:
        """Tokens [B, 1 + N, dim] after each block."""
        size = self.config.patch_size
        if pictures.size(-1) % size or pictures.size(-2) % size:
            raise ValueError(f"pictures of {list(pictures.shape[-2:])} are not a multiple of the patch size {size}")
        x = self.patch_embed(pictures)
        place = sine_position(x.size(-2), x.size(-1), self.config.dim).to(x)
        tokens = x.flatten(2).mT + place
        tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), 1)
        found = []
        for block in self.blocks:
            tokens = block(tokens)
            found.append(tokens)
        return found


def rehead_last_block(model: nn.Module, num_heads: int) -> int:
    """Change the number of heads of the last attention layer of a timm-style ViT, and return the old one.

    Only the split into heads changes: all weights keep their shapes.

    Raises:
        ValueError: the width is not divisible.
        TypeError: the last block has no ``attn`` with ``num_heads`` and ``qkv``.
    """
    blocks: Any = getattr(model, "blocks", None)
    attention: Any = getattr(blocks[-1], "attn", None) if blocks else None
    if attention is None or not hasattr(attention, "num_heads") or not hasattr(attention, "qkv"):
        raise TypeError(f"{type(model).__name__} has no blocks[-1].attn with num_heads and qkv")
    dim = attention.qkv.in_features
    if dim % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the width {dim}")
    old: int = attention.num_heads
    attention.num_heads = num_heads
    if hasattr(attention, "head_dim"):
        attention.head_dim = dim // num_heads
    if hasattr(attention, "scale"):
        attention.scale = (dim // num_heads) ** -0.5
    return old


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
