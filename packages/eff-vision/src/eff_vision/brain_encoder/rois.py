"""Regions of interest: which vertices (or voxels, or cells) each query is to explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RoiMasks:
    """Regions of one set of targets, such as a hemisphere.

    Attributes:
        masks: bool [R, V]; regions may overlap, and each target is in at least one.
        names: Name of each region.
    """

    masks: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.masks.ndim != 2 or self.masks.dtype != torch.bool:
            raise ValueError(f"masks must be bool [R, V], got {self.masks.dtype} {list(self.masks.shape)}")
        if len(self.names) != self.masks.size(0):
            raise ValueError(f"{self.masks.size(0)} regions need one name each, got {len(self.names)}")
        outside = ~self.masks.any(0)
        if bool(outside.any()):
            first = int(outside.nonzero()[0])
            raise ValueError(f"{int(outside.sum())} targets are in no region, such as {first}; add a rest region")
        if empty := [n for n, m in zip(self.names, self.masks, strict=True) if not bool(m.any())]:
            raise ValueError(f"regions without a target: {empty}")

    @property
    def num_targets(self) -> int:
        """Number of vertices."""
        return self.masks.size(1)

    @classmethod
    def from_labels(cls, labels: Tensor, names: Sequence[str] | None = None, *, rest: int = 0) -> RoiMasks:
        """One region for each label of an int tensor [V]; ``rest`` labels the targets of no named region.

        Args:
            labels: Label of each target.
            names: Names of the labels other than ``rest``, in increasing order of the labels.
            rest: Its targets become the last region, called "rest".
        """
        found = [int(x) for x in labels.unique()]
        named = [x for x in found if x != rest]
        texts = list(names) if names is not None else [str(x) for x in named]
        if len(texts) != len(named):
            raise ValueError(f"{len(named)} labels other than {rest} need one name each, got {len(texts)}")
        if rest in found:
            named, texts = [*named, rest], [*texts, "rest"]
        return cls(torch.stack([labels == x for x in named]), tuple(texts))
