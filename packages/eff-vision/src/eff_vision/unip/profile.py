"""The pattern of each layer, and the choice of the one to distil."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from eff_kernels.edit import Record
from torch import Tensor, nn

from eff_vision.unip.nmi import attention_distance, attention_entropy, attention_nmi
from eff_vision.unip.tap import AttentionTap

HYBRID = (0.03, 0.2)
"""Layers with an information between these are called hybrid: near patches and shared foreground (section 3.2). The
limits are ours: a window of one patch alone has 0.5, a shared disc alone 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile(Record):
    """Mean over pictures and heads of each layer's numbers, in the model's order.

    Attributes:
        nmi: Normalised mutual information, see `attention_nmi`.
        entropy: In nats.
        distance: In patches.
        num_pictures: How many were looked at.
    """

    nmi: tuple[float, ...]
    entropy: tuple[float, ...]
    distance: tuple[float, ...]
    num_pictures: int

    @property
    def pattern(self) -> tuple[Literal["local", "hybrid", "global"], ...]:
        """What to call each layer."""
        return tuple("local" if n > HYBRID[1] else "hybrid" if n >= HYBRID[0] else "global" for n in self.nmi)


@torch.no_grad()
def profile_attention(
    model: nn.Module, batches: Iterable[Tensor], *, grid: tuple[int, int], prefix: int = 1
) -> LayerProfile:
    """Run a model over batches of pictures and describe its attention layers.

    Args:
        model: A vision transformer; called as ``model(pictures)``.
        batches: Pictures [B, 3, H, W] each.
        grid: Rows and columns of patches.
        prefix: Class and register tokens in front of the patches: 5 for DINOv3, 1 for most, 0 for some.

    Raises:
        ValueError: there are no pictures.
    """
    was_training = model.training
    model.eval()
    sums: Tensor | None = None
    count = 0
    try:
        with AttentionTap(model) as tap:
            for pictures in batches:
                model(pictures)
                rows = [
                    torch.stack([
                        attention_nmi(tap[i], prefix=prefix).mean(1).sum(),
                        attention_entropy(tap[i], prefix=prefix).mean(1).sum(),
                        attention_distance(tap[i], grid, prefix=prefix).mean(1).sum(),
                    ])
                    for i in tap.layers
                ]  # fmt: skip
                total = torch.stack(rows, 1)
                sums = total if sums is None else sums + total
                count += len(pictures)
    finally:
        model.train(was_training)
    if sums is None or not count:
        raise ValueError("no pictures to profile the model on")
    nmi, entropy, distance = (tuple(row) for row in (sums / count).tolist())
    return LayerProfile(nmi=nmi, entropy=entropy, distance=distance, num_pictures=count)


def select_distill_layer(profile: LayerProfile, target: float = 0.09) -> int:
    """The layer (from 0) whose information is nearest to ``target`` (section 4.1); of equals the deepest.

    Layers before the most local one do not count: the rule supposes that information falls with depth, but the first
    layer of some models (of eff-embedded's ViT, for one) looks at a few outstanding patches from everywhere, which has
    the information of a hybrid layer and is none.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target must be from 0 to 1, got {target}")
    nmi = profile.nmi
    first = max(range(len(nmi)), key=nmi.__getitem__)
    return min(range(first, len(nmi)), key=lambda i: (abs(nmi[i] - target), -i))
