"""Heads between an encoder and its loss."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class HeadOutput(NamedTuple):
    """Both sides of a head.

    Attributes:
        features: What the encoder gives, [B, p]: usually what to keep.
        projection: What the loss sees, [B, q].
    """

    features: Tensor
    projection: Tensor


class HeadedEncoder(nn.Module):
    """An encoder with a head; gives both sides of it.

    Args:
        encoder: Pictures to features [B, p].
        head: Features to projections [B, q].
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> HeadOutput:
        """Features and projections of a batch.

        Raises:
            ValueError: the encoder does not give [B, p].
        """
        features = self.encoder(x)
        if features.ndim != 2:
            raise ValueError(f"the encoder must give [B, p], got {list(features.shape)}; pool its map first")
        return HeadOutput(features, self.head(features))


class MLPHead(nn.Sequential):
    """Linear layers with ReLU between them, the usual trained head.

    Args:
        dim: Features of the encoder.
        hidden: Width of the hidden layers.
        out: Width of the projection.
        layers: Linear layers in all.
        norm: "bn" puts batch norm after each hidden layer.
    """

    def __init__(self, dim: int, hidden: int, out: int, *, layers: int = 2, norm: Literal["bn"] | None = None) -> None:
        if layers < 1:
            raise ValueError(f"layers must be 1 or more, got {layers}")
        if norm not in (None, "bn"):
            raise ValueError(f"norm must be None or 'bn', got {norm!r}")
        widths = [dim, *[hidden] * (layers - 1), out]
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            last = i == layers - 1
            parts.append(nn.Linear(a, b, bias=last or norm is None))
            if not last:
                parts += [nn.BatchNorm1d(b), nn.ReLU()] if norm else [nn.ReLU()]
        super().__init__(*parts)


class IdentityInitHead(nn.Linear):
    """A square linear head without bias that begins as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, bias=False)
        nn.init.eye_(self.weight)


class SymmetricReLU(nn.Module):
    """``relu(x - b) - relu(-x - b)`` with one learnt threshold b: small values vanish (section 4.2)."""

    def __init__(self, threshold: float = 0.1) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x: Tensor) -> Tensor:
        """Shrink towards zero."""
        return torch.relu(x - self.threshold) - torch.relu(-x - self.threshold)


class ReweightingHead(nn.Module):
    """Multiplies feature i by ``kappa^-i``: no parameters, and no trained head to throw away (section 6).

    The encoder learns to put what the loss needs first. Keep the features before this head. Batch norm after it would
    undo it, dropout or a permutation before it too.

    Args:
        dim: Number of features.
        kappa: Ratio of neighbouring weights, positive: 1.05 for self-supervised, 1.5 for supervised contrastive, 1.2
            for supervised training. `choose_kappa` finds it from the number of features that are to matter.
        floor: Smallest weight.
    """

    weights: Tensor

    def __init__(self, dim: int, kappa: float = 1.05, *, floor: float = 0.0) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be 1 or more, got {dim}")
        if not (math.isfinite(kappa) and kappa > 0):
            raise ValueError(f"kappa must be positive, got {kappa}")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must be from 0 to 1, got {floor}")
        if kappa == 1:
            warnings.warn("kappa=1 weighs all features alike: the head does nothing", stacklevel=2)
        weights = torch.tensor(kappa, dtype=torch.float64) ** -torch.arange(dim, dtype=torch.float64)
        self.register_buffer("weights", weights.clamp_min(floor).float())

    def forward(self, features: Tensor) -> Tensor:
        """Scale features [..., dim]; computed in float32, since kappa^-i underflows in half precision."""
        if features.size(-1) != self.weights.numel():
            raise ValueError(f"wanted {self.weights.numel()} features, got {features.size(-1)}")
        return (features.float() * self.weights.float()).to(features.dtype)


def choose_kappa(effective_dim: float) -> float:
    """The kappa of a `ReweightingHead` whose weights count for ``effective_dim`` features: ``sum kappa^-2i`` of them.

    Raises:
        ValueError: the number is not above 1.
    """
    if not (math.isfinite(effective_dim) and effective_dim > 1):
        raise ValueError(f"effective_dim must be above 1, got {effective_dim}")
    return (1 - 1 / effective_dim) ** -0.5
