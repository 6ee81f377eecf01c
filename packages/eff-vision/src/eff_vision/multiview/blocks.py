"""Transformer blocks with rotary codes of two dimensions.

Attention ends in PyTorch's own function, so that eff-attention finds and exchanges it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rope_table(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., dim] of positions (row, column) [..., 2]: rows turn the first half, columns the other."""
    quarter = dim // 4
    frequency = base ** (-torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter)
    angle = (positions[..., None].float() * frequency).repeat_interleave(2, -2)  # both members of a pair turn alike
    angle = angle.flatten(-2)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys [B, H, N, dim] by a table [N, dim] or [B, 1, N, dim]."""
    cos, sin = (t.to(x.dtype) for t in table)
    quarters = x.unflatten(-1, (2, 2, -1))
    turned = torch.stack((-quarters[..., 1, :], quarters[..., 0, :]), -2).flatten(-3)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Softmax attention of all tokens to all.

    Args:
        dim: Width.
        heads: Heads.
        qk_norm: Normalise queries and keys.
    """

    def __init__(self, dim: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens [B, N, dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class LayerScale(nn.Module):
    """A learnt factor for each channel of a branch."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled tokens."""
        return x * self.gamma


class Mlp(nn.Sequential):
    """Two linear layers around GELU."""

    def __init__(self, dim: int, width: int, out: int | None = None) -> None:
        super().__init__(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim if out is None else out))


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer.

    Args:
        dim: Width.
        heads: Heads.
        qk_norm: Normalise queries and keys.
        layer_scale: First value of the factors on both branches.
    """

    def __init__(self, dim: int, heads: int, *, qk_norm: bool, layer_scale: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, qk_norm=qk_norm)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls1, self.ls2 = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens [B, N, dim]."""
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))
