"""Window attention, SwiGLU, squeeze-and-excitation, and the drops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eff_vision.specvit.config import LolaSpecViTConfig
from eff_vision.specvit.lora import LoraLinear, PublishedAdapter


def linear(config: LolaSpecViTConfig, name: str, inside: int, outside: int) -> nn.Linear:
    """A linear layer, with an adapter where the settings ask for one."""
    if config.paper_compat and name != "head":
        return PublishedAdapter(inside, outside, rank=config.lora_rank, alpha=config.lora_alpha)
    if not config.lora_rank or name not in config.lora_targets:
        return nn.Linear(inside, outside)
    return LoraLinear(inside, outside, rank=config.lora_rank, alpha=config.lora_alpha, gate=config.lora_gate)


class SqueezeExcite(nn.Module):
    """Each channel times a factor in (0, 1) that depends on the means of all channels."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.factors = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale a map [B, C, ...]."""
        factors = self.factors(x.flatten(2).mean(-1))
        return x * factors.view(*factors.shape, *[1] * (x.ndim - 2))


class BandDropout(nn.Module):
    """Leaves out whole (channel, band) maps of [B, C, bands, H, W] and scales up the rest."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop in training."""
        if not self.training or not self.p:
            return x
        return x * x.new_empty(*x.shape[:3], 1, 1).bernoulli_(1 - self.p) / (1 - self.p)


def drop_path(x: Tensor, p: float, *, training: bool) -> Tensor:
    """Leave out a branch [B, ...] of whole items."""
    if not training or not p:
        return x
    return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - p) / (1 - p)


def windows(x: Tensor, size: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Cut maps [B, H, W, C] into windows [B, n, size * size, C], zero-padded; bool [n, size * size] of real tokens."""
    height, width = x.shape[1:3]
    down, right = -height % size, -width % size
    padded = F.pad(x, (0, 0, 0, right, 0, down))
    real = F.pad(torch.ones(height, width, dtype=torch.bool, device=x.device), (0, right, 0, down))
    rows, columns = padded.size(1) // size, padded.size(2) // size
    cut = padded.view(x.size(0), rows, size, columns, size, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    mask = real.view(rows, size, columns, size).transpose(1, 2).flatten(2).flatten(0, 1)
    return cut, mask, (height, width)


def unwindow(cut: Tensor, size: int, shape: tuple[int, int]) -> Tensor:
    """The inverse of `windows`: [B, n, size * size, C] to [B, H, W, C]."""
    rows, columns = -(-shape[0] // size), -(-shape[1] // size)
    whole = cut.view(cut.size(0), rows, columns, size, size, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return whole[:, : shape[0], : shape[1]]


class WindowAttention(nn.Module):
    """Attention inside windows with a learnt bias for each offset."""

    def __init__(self, config: LolaSpecViTConfig, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size, self.masked = heads, config.window_size, not config.paper_compat
        self.qkv, self.proj = linear(config, "qkv", dim, 3 * dim), linear(config, "proj", dim, dim)
        self.bias = nn.Parameter(torch.randn((2 * self.size - 1) ** 2, heads) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within maps [B, H, W, C]."""
        size = min(self.size, max(x.shape[1:3])) if self.masked else self.size
        cut, real, shape = windows(x, size)
        q, k, v = self.qkv(cut).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self._bias(size)[None, None]
        if self.masked and (shape[0] % size or shape[1] % size):
            bias = bias.masked_fill(~real[None, :, None, None, :], -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, bias.expand(1, real.size(0), -1, -1, -1).to(q.dtype))
        return unwindow(self.proj(out.transpose(2, 3).flatten(3)), size, shape)

    def _bias(self, size: int) -> Tensor:
        """Bias [heads, size^2, size^2]; a small window uses the same entry for the same offset."""
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        place = torch.stack((y, x), -1).flatten(0, 1)
        offset = place[:, None] - place[None] + self.size - 1
        index = offset[..., 0] * (2 * self.size - 1) + offset[..., 1]
        return self.bias[index.to(self.bias.device)].permute(2, 0, 1)


class SwiGLU(nn.Module):
    """``W3 (silu(W1 x) * W2 x)`` with a hidden width of 8/3 of the input, rounded up to 8."""

    def __init__(self, config: LolaSpecViTConfig, dim: int) -> None:
        super().__init__()
        hidden = -(-8 * dim // 3 // 8) * 8
        self.w1, self.w2 = (linear(config, n, dim, hidden) for n in ("w1", "w2"))
        self.w3 = linear(config, "w3", hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to [..., dim]."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class PublishedSwiGLU(nn.Module):
    """The published MLP: a SwiGLU of three matrices 4d x 4d between two adapters."""

    def __init__(self, config: LolaSpecViTConfig, dim: int) -> None:
        super().__init__()
        wide = 4 * dim
        self.into = linear(config, "w1", dim, wide)
        self.w1, self.w2, self.w3 = (nn.Linear(wide, wide) for _ in range(3))
        self.out = linear(config, "w3", wide, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to [..., dim]."""
        z = self.into(x)
        return self.out(self.w3(F.silu(self.w1(z)) * self.w2(z)))
