"""The bridge: each stream reads the features of all tasks, and teaches its own alone (section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_vision.panorama.layers import PanoConv2d


class GradientTruncatedBridge(nn.Module):
    """Attention of a stream's aggregate to the features of all tasks.

    Args:
        tasks: All tasks.
        own: Those of this stream; the others are read without gradients.
        dim: Channels.
        heads: Of attention.
        mlp_ratio: Width of the feed-forward layer over ``dim``.
        truncate: Whether to cut those gradients.

    Raises:
        ValueError: a task of ``own`` is not in ``tasks``.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        own: tuple[str, ...],
        dim: int,
        *,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        truncate: bool = True,
    ) -> None:
        super().__init__()
        if missing := sorted(set(own) - set(tasks)):
            raise ValueError(f"own tasks {missing} are not among {tasks}")
        self.tasks, self.own, self.heads, self.truncate = tasks, own, heads, truncate
        self.shrink = nn.ModuleDict({task: PanoConv2d(dim, dim, 3, stride=2) for task in tasks})
        self.query_norm, self.key_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        width = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, aggregate: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Maps [B, dim, H, W] from the stream's aggregate and the features of each task, of that shape too."""
        tokens = []
        for task in self.tasks:
            # Cut in front of the convolution, so that it learns to read foreign tasks too.
            feature = features[task]
            source = feature.detach() if self.truncate and task not in self.own else feature
            tokens.append(self.shrink[task](source).flatten(2).mT)
        x = aggregate.flatten(2).mT
        key, value = self.key_value(self.key_norm(torch.cat(tokens, 1))).chunk(2, -1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(self.query_norm(x)), key, value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        x = x + self.mlp(self.mlp_norm(x))
        return x.mT.unflatten(-1, aggregate.shape[-2:])
