"""Weights of 4 and 8 bits with a scale for each group of 32 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels import GroupWeight, group_linear
from eff_kernels.ops.group_linear import GROUP
from torch import Tensor

from eff_serve.engine.linear import stack_biases

_SHRINKS = tuple(1 - 0.03 * i for i in range(10))


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """Settings of `GroupLinear`: codes of 4 bits have a minimum too, those of 8 are symmetric."""

    bits: int = 4


@dataclass(frozen=True, slots=True)
class GroupLinear:
    """Codes in groups of 32; activations become int8 in the same groups.

    Attributes:
        order: int64 [K], in which order the weight wants its inputs; None is as they are.
    """

    weight: GroupWeight
    bias: Tensor | None = None
    order: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return group_linear(x if self.order is None else x[:, self.order], self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self.weight.nbytes

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, config: Any) -> GroupLinear:
        """From a float weight [N, K].

        Raises:
            ValueError: K is no multiple of 32.
        """
        return cls(quantize_groups(weight, config.bits), bias)

    @staticmethod
    def stack(layers: Sequence[GroupLinear]) -> GroupLinear | None:
        """One layer with the outputs of all, if their weights lie alike."""
        if any(layer.order is not None for layer in layers):
            return None
        weight = GroupWeight.stack([layer.weight for layer in layers])
        if weight is None:
            return None
        return GroupLinear(weight, stack_biases([layer.bias for layer in layers], [layer.weight.n for layer in layers]))


@dataclass(frozen=True, slots=True)
class GroupRows:
    """An embedding that stays in its codes: indexing gives rows in float32."""

    weight: GroupWeight

    def __getitem__(self, tokens: Tensor) -> Tensor:
        return self.weight.rows(tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self.weight.nbytes


def quantize_groups(weight: Tensor, bits: int) -> GroupWeight:
    """Codes of a float weight [N, K].

    With 8 bits the largest magnitude of a group has code 127. With 4 the range of a group, or a part of it, is cut into
    15 steps, whichever part leaves the least squared error.

    Raises:
        ValueError: K is no multiple of 32.
    """
    n, k = weight.shape
    if k % GROUP:
        raise ValueError(f"groups of {GROUP} columns do not divide the {k} inputs of a layer")
    if bits == 8:
        groups = weight.float().view(n, -1, GROUP)
        scale = (groups.abs().amax(2) / 127).half().float()
        codes = (groups / scale.clamp_min(1e-8)[..., None]).round().clamp(-127, 127) + 128
        return GroupWeight.pack(codes.to(torch.uint8).view(n, k), scale, bits=8, offset=128)
    parts = [_four_bits(rows.float().view(-1, k // GROUP, GROUP)) for rows in weight.split(max(1, (1 << 22) // k))]
    codes, scale, minimum = (torch.cat(p) for p in zip(*parts, strict=True))
    return GroupWeight.pack(codes.view(n, k), scale, minimum, bits=4)


def _four_bits(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 like ``groups`` [rows, groups, 32], scales and minima [rows, groups] that float16 holds."""
    low, high = groups.amin(2), groups.amax(2)
    middle, half = (low + high) / 2, (high - low) / 2
    best = torch.full_like(low, torch.inf)
    found = torch.zeros_like(groups), torch.zeros_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS:
        scale = (half * (2 * shrink / 15)).half().float()
        minimum = (middle - half * shrink).half().float()
        codes = ((groups - minimum[..., None]) / scale.clamp_min(1e-8)[..., None]).round().clamp(0, 15)
        error = (codes * scale[..., None] + minimum[..., None] - groups).square().sum(2)
        better = error < best
        best = torch.where(better, error, best)
        found = (
            torch.where(better[..., None], codes, found[0]),
            torch.where(better, scale, found[1]),
            torch.where(better, minimum, found[2]),
        )
    return found[0].to(torch.uint8), found[1], found[2]
