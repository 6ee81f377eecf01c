"""Low-rank adapters that begin as the identity, and the published ones that do not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Linear):
    """``y = W x + b + strength * (alpha / r) B diag(2 sigmoid(g)) A x``; B begins at zero, so that nothing changes.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        rank: r, at least 1.
        alpha: Scale times r.
        gate: Whether g is learnt; without it the diagonal is 1.
        bias: Whether there is b.
    """

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, alpha: float, gate: bool = False, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if rank < 1:
            raise ValueError(f"rank must be 1 or more, got {rank}")
        self.scale = alpha / rank
        self.strength = 1.0
        self.merged = False
        self.lora_a = nn.Parameter(torch.empty(rank, in_features))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank))
        self.lora_g = nn.Parameter(torch.zeros(rank)) if gate else None
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def delta(self) -> Tensor:
        """What the adapter adds to the weight at full strength, [out, in]."""
        a = self.lora_a if self.lora_g is None else 2 * self.lora_g.sigmoid()[:, None] * self.lora_a
        return self.scale * (self.lora_b @ a)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; the strength counts in training only."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        low = F.linear(x, self.lora_a)
        if self.lora_g is not None:
            low = low * (2 * self.lora_g.sigmoid())
        return y + (self.strength if self.training else 1.0) * self.scale * F.linear(low, self.lora_b)

    @torch.no_grad()
    def merge_(self) -> None:
        """Add the adapter to the weight, and leave it out from then on. A second call does nothing."""
        if not self.merged:
            self.weight += self.delta()
            self.merged = True


class PublishedAdapter(nn.Linear):
    """The published adapter: ``W x + b + sigmoid(G x) (alpha / r) B A x + R x`` with full matrices G and R."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__(in_features, out_features)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, in_features))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank))
        self.lora_gate = nn.Parameter(torch.empty(out_features, in_features))
        self.lora_residual = nn.Parameter(torch.empty(out_features, in_features))
        for matrix in (self.lora_a, self.lora_gate, self.lora_residual):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        low = F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale
        return super().forward(x) + F.linear(x, self.lora_gate).sigmoid() * low + F.linear(x, self.lora_residual)
