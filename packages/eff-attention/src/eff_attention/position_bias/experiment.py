"""The controlled experiment: a small attention network learns in context, and ties between positions show its bias.

Section 5: pairs of items and labels stand in a row, then an item whose class was among them; the network gives the
label. Where two positions look alike to the query, the mask and the encoding of positions decide which one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from eff_kernels.edit import Settings
from torch import Tensor, nn
from torch.nn import functional

from eff_attention.position_bias.graphs import MaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBiasTask(Settings):
    """How sequences are drawn.

    Attributes:
        pairs: Items with labels in a sequence.
        repeats: How often each class of a sequence occurs in it.
        classes: Classes of the training.
        labels: Labels that classes have.
        size: Dimensions of items and labels.
        noise: Of items around the mean of their class.
        answers: Positions at which the query's class may stand; None for all, which is no bias of the training.
    """

    pairs: int = 8
    repeats: int = 4
    classes: int = 1024
    labels: int = 8
    size: int = 32
    noise: float = 0.1
    answers: tuple[int, ...] | None = None

    def check(self) -> None:
        """See `Settings`."""
        if self.repeats < 1 or self.pairs % self.repeats or self.pairs // self.repeats < 2:
            raise ValueError(f"pairs={self.pairs}, repeats={self.repeats}; use a multiple, and two classes or more")
        if self.labels < self.pairs // self.repeats or self.classes < self.labels:
            raise ValueError(
                f"labels={self.labels}, classes={self.classes}; use more, the classes of a sequence differ"
            )
        if self.answers is not None and not 0 <= min(self.answers) <= max(self.answers) < self.pairs:
            raise ValueError(f"answers={self.answers}; the positions are 0..{self.pairs - 1}")


class Draw:
    """Sequences of a task.

    Args:
        task: Settings.
        generator: All randomness comes from it.
    """

    def __init__(self, task: PositionBiasTask, generator: torch.Generator) -> None:
        self.task, self.generator = task, generator
        self.label_vectors = self._normal(task.labels, task.size)
        self.means = self._normal(task.classes, task.size)
        self.label_of = torch.randint(task.labels, (task.classes,), generator=generator)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * self.task.size**-0.5

    def training(self, batch: int) -> tuple[Tensor, Tensor]:
        """Inputs [B, 2 pairs + 1, D] and labels [B] of classes that come again and again."""
        means, labels, _ = self._sequences(batch, new=False)
        allowed = torch.arange(self.task.pairs) if self.task.answers is None else torch.tensor(self.task.answers)
        asked = allowed[torch.randint(len(allowed), (batch,), generator=self.generator)]
        return self._inputs(means, labels, asked), labels[torch.arange(batch), asked]

    def tie(self, batch: int, right: int, other: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of new classes, with the item at ``right`` put at ``other`` too, whose label stays."""
        means, labels, kinds = self._sequences(batch, new=True)
        rows = torch.arange(batch)
        # The two positions must be of different classes: where they are not, another position changes places.
        same = kinds[:, right] == kinds[:, other]
        elsewhere = (kinds != kinds[:, right, None]).int().argmax(1)
        for x in (means, labels, kinds):
            here, there = x[rows, other].clone(), x[rows, elsewhere].clone()
            keep = same.view(-1, *[1] * (here.dim() - 1))
            x[rows, other] = torch.where(keep, there, here)
            x[rows, elsewhere] = torch.where(keep, here, there)
        asked = torch.full((batch,), right)
        return self._inputs(means, labels, asked, copy_to=other), labels[:, right]

    def _sequences(self, batch: int, *, new: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Means [B, N, D], labels [B, N] and classes within the sequence [B, N] of shuffled pairs."""
        task, count = self.task, self.task.pairs // self.task.repeats
        if new:
            means = self._normal(batch, count, task.size)
            labels = torch.rand(batch, task.labels, generator=self.generator).argsort(1)[:, :count]
        else:
            labels = torch.rand(batch, task.labels, generator=self.generator).argsort(1)[:, :count]
            # A class of each label, by drawing among the classes that have it.
            score = torch.rand(batch, 1, task.classes, generator=self.generator)
            fits = self.label_of[None, None] == labels[..., None]
            means = self.means[torch.where(fits, score, -1.0).argmax(-1)]
        order = torch.rand(batch, task.pairs, generator=self.generator).argsort(1) % count
        rows = torch.arange(batch)[:, None]
        return means[rows, order], labels[rows, order], order

    def _inputs(self, means: Tensor, labels: Tensor, asked: Tensor, copy_to: int | None = None) -> Tensor:
        batch, pairs, size = means.shape
        noise, scale = self.task.noise, (1 + self.task.noise**2) ** -0.5
        items = (means + noise * self._normal(batch, pairs, size)) * scale
        rows = torch.arange(batch)
        if copy_to is not None:
            items[:, copy_to] = items[rows, asked]
        query = (means[rows, asked] + noise * self._normal(batch, size)) * scale
        both = torch.stack([items, self.label_vectors[labels]], 2).flatten(1, 2)
        return torch.cat([both, query[:, None]], 1)


class SelfAttentionNetwork(nn.Module):
    """Layers of one attention head each, then three linear layers with ReLU on the last token.

    Args:
        size: Width.
        depth: Layers of attention.
        labels: Outputs.
        mask: Who sees whom.
        decay: Factor of a weight for each token of distance, before the softmax's norm; 1 is none.
    """

    def __init__(self, size: int, depth: int, labels: int, mask: MaskSpec, decay: float = 1.0) -> None:
        super().__init__()
        self.mask, self.decay = mask, decay
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(size, size, bias=False) for _ in "qkv") for _ in range(depth)
        )
        self.head = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(size, size), nn.ReLU())))
        self.last = nn.Linear(size, labels)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, labels] of inputs [B, n, D]."""
        n = x.shape[1]
        place = torch.arange(n)
        bias = (place[:, None] - place).abs() * torch.tensor(self.decay).log()
        bias = bias.masked_fill(~self.mask.mask(n), -torch.inf)
        for layer in self.layers:
            query, key, value = (projection(x) for projection in cast(nn.ModuleList, layer))
            x = x + (query @ key.mT * x.shape[-1] ** -0.5 + bias).softmax(-1) @ value
        logits: Tensor = self.last(self.head(x[:, -1]))
        return logits


def train_network(
    task: PositionBiasTask,
    *,
    depth: int = 2,
    mask: MaskSpec | None = None,
    decay: float = 1.0,
    steps: int = 2000,
    batch: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> tuple[SelfAttentionNetwork, Draw]:
    """Train a network on a task; returns it with the source of sequences that its labels belong to."""
    draw = Draw(task, torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SelfAttentionNetwork(task.size, depth, task.labels, mask or MaskSpec(), decay)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-6)
    for _ in range(steps):
        inputs, wanted = draw.training(batch)
        loss = functional.cross_entropy(network(inputs), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval(), draw


@torch.no_grad()
def position_gap(network: nn.Module, draw: Draw, first: int, second: int, count: int = 4096) -> float:
    """How much more often the answer at ``first`` is found than the one at ``second``, where both look alike.

    Above 0 the network prefers the first position. ``count`` sequences of new classes are drawn for each.
    """
    right: Sequence[float] = [
        float((network(inputs).argmax(-1) == wanted).double().mean())
        for inputs, wanted in (draw.tie(count, first, second), draw.tie(count, second, first))
    ]
    return right[0] - right[1]
