"""The layers: projections to queries, keys and values, neighborhood attention, projection of the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import ClassVar

from eff_kernels.ops.neighborhood_attention.args import check_windows, each_axis
from torch import Tensor, nn

from eff_attention.neighborhood.functional import neighborhood_attention


class _NeighborhoodAttention(nn.Module):
    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim = {embed_dim} must be a multiple of num_heads = {num_heads}, both at least 1")
        axes = [each_axis(*args, self.rank, int) for args in (
            ("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)
        )]  # fmt: skip
        check_windows([sys.maxsize] * self.rank, *axes)  # how long the axes are shows when it runs
        each_axis("is_causal", is_causal, self.rank, bool)
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.kernel_size, self.stride, self.dilation, self.is_causal = kernel_size, stride, dilation, is_causal
        self.scale = qk_scale
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *S, embed_dim] to the same shape."""
        width = self.qkv.in_features
        if x.dim() != self.rank + 2 or x.size(-1) != width:
            raise ValueError(
                f"{type(self).__name__} takes {self.rank + 2} dimensions [B, *S, C] "
                f"with the C = {width} channels last, got {list(x.shape)}"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        windows = (self.kernel_size, self.stride, self.dilation, self.is_causal)
        out = neighborhood_attention(q, k, v, *windows, self.scale)
        assert isinstance(out, Tensor)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention over sequences, [B, L, C] to [B, L, C]; parameters are named as natten's."""

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention over pictures, [B, X, Y, C] to [B, X, Y, C]; parameters are named as natten's."""

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention over videos, [B, X, Y, Z, C] to [B, X, Y, Z, C]; parameters are named as natten's."""

    rank = 3
