"""Pictures in a prompt: embeddings in place of tokens, and LoRA for whatever comes behind the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from eff_kernels import linear
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PromptPictures:
    """The pictures of one prompt.

    Attributes:
        places: int64 [tokens], where in the prompt their tokens stand, ascending.
        embeddings: float32 [tokens, hidden], what the model reads there.
        saliency: float32 [2, pictures, tokens of one], what the vision tower's class token attends to in its first and
            in its last layer but one; None where nobody looked.
    """

    places: Tensor
    embeddings: Tensor
    saliency: Tensor | None = None

    def __post_init__(self) -> None:
        if self.places.ndim != 1 or self.embeddings.shape[:1] != self.places.shape or not self.places.numel():
            raise ValueError(
                f"places {list(self.places.shape)} and embeddings {list(self.embeddings.shape)} must be of one length, "
                "1 or more"
            )

    @property
    def first(self) -> int:
        """Place of the first picture's first token."""
        return int(self.places[0])

    def put_into(self, hidden: Tensor, start: int) -> None:
        """Overwrite rows of ``hidden`` [T, hidden], which stand for tokens from ``start`` on, where pictures are."""
        low, high = torch.searchsorted(self.places, torch.tensor([start, start + hidden.size(0)])).tolist()
        hidden[self.places[low:high] - start] = self.embeddings[low:high]


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """b a, a low-rank addition to a projection: a [rank, in], b [out, rank]."""

    a: Tensor
    b: Tensor

    def add(self, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """Add it to ``rows`` of y, the projection of x; each row by itself, whatever else is in the batch."""
        y[rows] += linear(linear(x[rows], self.a), self.b)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """LoRA of all layers for the decoder's fused projections; `at` applies it to some rows.

    Attributes:
        layers: For each layer the pairs by projection: "qkv", "output", "gate_up", "down".
    """

    layers: tuple[Mapping[str, _Pair], ...]

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], num_layers: int, sizes: Mapping[str, int]) -> LowRank:
        """Fuse LoRA weights.

        Args:
            weights: ``<layer>.<projection>.lora_a`` [rank, in] and ``lora_b`` [out, rank], such as "3.q_proj.lora_a".
            num_layers: Layers of the decoder.
            sizes: Outputs of each projection that is fused with others.

        Raises:
            ValueError: a weight is for no projection of the decoder.
        """
        left = set(weights)
        layers = []
        for i in range(num_layers):
            pairs = {}
            for fused, parts in FUSED.items():
                found = [(p, weights.get(f"{i}.{p}.lora_a"), weights.get(f"{i}.{p}.lora_b")) for p in parts]
                here = [(p, a.float(), b.float()) for p, a, b in found if a is not None and b is not None]
                left -= {f"{i}.{p}.lora_{x}" for p, _, _ in here for x in "ab"}
                if here:
                    pairs[fused] = _Pair(*fuse({p: (a, b) for p, a, b in here}, parts, sizes))
            layers.append(pairs)
        if left:
            raise ValueError(f"LoRA weights {sorted(left)[:4]} are for no projection of this decoder")
        return cls(tuple(layers))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.a.nbytes + p.b.nbytes for layer in self.layers for p in layer.values())

    def add(self, layer: int, projection: str, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """Add a layer's LoRA to ``rows`` of y, its projection of x, in place."""
        if (pair := self.layers[layer].get(projection)) is not None:
            pair.add(x, y, rows)


FUSED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "output": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def fuse(
    pairs: Mapping[str, tuple[Tensor, Tensor]], parts: tuple[str, ...], sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """One pair (a, b) for projections side by side: the a's below one another, the b's as blocks.

    Args:
        pairs: For some of the parts, a [rank, in] and b [out, rank].
        parts: The projections in their order.
        sizes: Outputs of the projections that have no pair.
    """
    ranks = sum(a.size(0) for a, _ in pairs.values())
    rows, column = [], 0
    for part in parts:
        if part not in pairs:
            rows.append(torch.zeros(sizes[part], ranks))
            continue
        b = pairs[part][1]
        block = torch.zeros(b.size(0), ranks)
        block[:, column : column + b.size(1)] = b
        column += b.size(1)
        rows.append(block)
    a = torch.cat([a for a, _ in pairs.values()]) if pairs else torch.zeros(0, 0)
    return a.contiguous(), torch.cat(rows).contiguous()
