"""The attention of one layer: its settings and the learnt projection of the linear branch."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from eff_kernels import SparseLinearOutput, block_map, sparse_linear_attention
from torch import Tensor, nn

from eff_attention.autocast import alike
from eff_attention.sparse_linear.config import SLAConfig
from eff_attention.sparse_linear.token_level import token_linear_attention


class SparseLinearAttention(nn.Module):
    """``sparse + linear W^T + b`` for q, k, v of a layer; W and b are zero at first, which is the sparse branch alone.

    W and b are made in float32 whatever the model's dtype, and shared by all heads; ``model.to(dtype)`` converts them
    too. (Lite3R has no b and begins with W ~ N(0, 1e-3), which costs its models 1 %; zeros learn as well, since the
    gradient of W is that of the output times the linear branch.)

    Attributes:
        config: The settings, which may be replaced at any time.
        proj: The projection, [head_dim, head_dim] with bias.
        ran: How the last call ran: "sparse", "dense" (fewer keys than ``min_tokens``), "masked" (dense, with a mask),
            or "" before the first.
    """

    def __init__(self, head_dim: int, config: SLAConfig | None = None, *, device: torch.device | None = None) -> None:
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"head_dim={head_dim}; wanted at least 1")
        self.config = config or SLAConfig()
        self.ran = ""
        self.proj = nn.Linear(head_dim, head_dim, device=device, dtype=torch.float32)
        with torch.no_grad():
            self.proj.weight.zero_()
            self.proj.bias.zero_()

    @property
    def sparsity(self) -> float:
        """Share of the blocks, or keys, that the exact branch skips, 1 - k_high; may be set at run time."""
        return 1 - self.config.k_high

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        high = 1 - value
        self.config = dataclasses.replace(self.config, k_high=high, k_low=min(self.config.k_low, value))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Attend, [B, H, L, D] to the same shape and dtype; k and v may have fewer heads.

        Raises:
            ValueError: q and k differ in length, or the head dimension is not that of the projection.
        """
        if q.size(2) != k.size(2):
            raise ValueError(f"sparse-linear attention is self-attention, got {q.size(2)} queries, {k.size(2)} keys")
        if v.size(-1) != self.proj.in_features:
            raise ValueError(f"values have {v.size(-1)} features, the projection {self.proj.in_features}")
        if not self.is_sparse(k.size(2)):
            self.ran = "dense"
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.size(1) != k.size(1))
        self.ran = "sparse"
        q, k, v = alike(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            sparse, linear, _ = self.branches(q, k, v, scale)
            wide = torch.promote_types(self.proj.weight.dtype, q.dtype)
            weight, bias = self.proj.weight.to(wide), self.proj.bias.to(wide)
            return F.linear(linear.to(wide), weight, bias).add_(sparse).to(q.dtype)

    def is_sparse(self, keys: int) -> bool:
        """Whether a call with so many keys runs sparse."""
        return keys >= max(1, self.config.min_tokens)

    def branches(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> SparseLinearOutput:
        """The two branches before the projection."""
        c = self.config
        if c.selection == "token":
            return token_linear_attention(
                q, k, v, keep=c.k_high, feature_map=c.feature_map, protect=c.protect, scale=scale
            )
        chosen = block_map(
            q, k, k_high=c.k_high, k_low=c.k_low, block_q=c.block_q, block_k=c.block_k, smooth_k=c.smooth_k,
            protect=c.protect,
        )  # fmt: skip
        return sparse_linear_attention(
            q, k, v, chosen, feature_map=c.feature_map, linear_scope=c.linear_scope, scale=scale
        )

    def extra_repr(self) -> str:
        """Settings that a printed model shows."""
        return f"sparsity={self.sparsity:.3g}, k_low={self.config.k_low}, scope={self.config.linear_scope!r}"
