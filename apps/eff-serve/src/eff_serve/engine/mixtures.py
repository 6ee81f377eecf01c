"""A mixture of LoRA experts as one model of the server: its routers choose experts for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from eff_kernels import grouped_lora, linear
from torch import Tensor
from torch.nn import functional

from eff_serve.engine.adapter_files import MixtureFiles
from eff_serve.pictures.prompt import FUSED


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """A fused projection of P routed parts with E experts each; part p's expert e is number p * E + e.

    Attributes:
        a: [P * E, rank, in].
        b: [P * E, out, rank], zeros at the outputs of other parts.
        routers: [P * E, in].
        absent: Experts without weights, bool [P, E], which are never chosen.
        top_k: Experts of a token in each part.
    """

    a: Tensor
    b: Tensor
    routers: Tensor
    absent: Tensor
    top_k: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.a.nbytes + self.b.nbytes + self.routers.nbytes

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Y [T, out] with what the experts of each row of x [T, in] add; every row by itself."""
        parts, experts = self.absent.shape
        logits = linear(x.float(), self.routers).view(-1, parts, experts).masked_fill(self.absent, -torch.inf)
        best = logits.topk(self.top_k, -1)
        ids = best.indices + experts * torch.arange(parts)[:, None]
        return grouped_lora(x, self.a, self.b, ids.flatten(1), best.values.softmax(-1).flatten(1), y=y)


def routed_layers(
    files: MixtureFiles, shapes: Mapping[str, tuple[int, int]], num_layers: int
) -> tuple[dict[str, Routed], ...]:
    """The routed projections of each layer by the names of the fused ones."""
    layers: list[dict[str, Routed]] = []
    for i in range(num_layers):
        here = {}
        for fused, parts in FUSED.items():
            routed = [part for part in parts if (i, part) in files.routers]
            if routed:
                here[fused] = _fused(files, i, parts, routed, shapes)
        layers.append(here)
    return tuple(layers)


def _fused(
    files: MixtureFiles, layer: int, parts: tuple[str, ...], routed: list[str], shapes: Mapping[str, tuple[int, int]]
) -> Routed:
    outs = [shapes[part][0] for part in parts]
    found = [[e.get((layer, part)) for e in files.experts] for part in routed]
    rank = max((pair[0].size(0) for row in found for pair in row if pair is not None), default=1)
    first, second = [], []
    for part, row in zip(routed, found, strict=True):
        at = parts.index(part)
        before, after = sum(outs[:at]), sum(outs[at + 1 :])
        for pair in row:
            a, b = pair or (torch.zeros(0, shapes[part][1]), torch.zeros(outs[at], 0))
            first.append(functional.pad(a, (0, 0, 0, rank - a.size(0))))
            second.append(functional.pad(b, (0, rank - b.size(1), before, after)))
    return Routed(
        torch.stack(first),
        torch.stack(second),
        torch.cat([files.routers[layer, part] for part in routed]).contiguous(),
        torch.tensor([[pair is None for pair in row] for row in found]),
        files.top_k,
    )
