"""Masks as directed graphs: who may look at whom, and who reaches whom through how many layers (section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """A kind of mask.

    Attributes:
        kind: "causal", "window" (causal, the last ``size`` keys), "prefix" (causal, but the first ``size`` tokens see
            each other) or "full".
        size: Width of the window or length of the prefix.
    """

    kind: Literal["causal", "window", "prefix", "full"] = "causal"
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("causal", "window", "prefix", "full"):
            raise ValueError(f"kind={self.kind!r}; use 'causal', 'window', 'prefix' or 'full'")
        if self.kind in ("window", "prefix") and self.size < 1:
            raise ValueError(f"a {self.kind} needs a size of 1 or more, got {self.size}")

    def mask(self, n: int) -> Tensor:
        """Who sees whom among ``n`` tokens, bool [n, n]: row i sees the columns that are True.

        Raises:
            ValueError: the prefix is longer than the text.
        """
        if n < 1:
            raise ValueError(f"n must be 1 or more, got {n}")
        if self.kind == "full":
            return torch.ones(n, n, dtype=torch.bool)
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        if self.kind == "window":
            return causal.triu(1 - self.size)
        if self.kind == "prefix":
            if self.size > n:
                raise ValueError(f"a prefix of {self.size} is longer than {n} tokens")
            causal[: self.size, : self.size] = True
        return causal


def centre_nodes(mask: Tensor) -> list[list[int]]:
    """The tokens from which each part of a mask's graph can be reached: where influence ends up in deep models.

    Args:
        mask: bool [n, n].

    Returns:
        For each connected part of the graph the tokens that reach all of it, possibly none.
    """
    n = _square(mask)
    reach = mask | torch.eye(n, dtype=torch.bool)
    for _ in range(max(1, n.bit_length())):  # squares: paths of 2, 4, 8, ... steps
        reach = (reach.float() @ reach.float()) > 0
    together = reach | reach.T
    for _ in range(max(1, n.bit_length())):
        together = (together.float() @ together.float()) > 0
    parts, centres = set(), []
    for row in together:
        part = tuple(row.nonzero()[:, 0].tolist())
        if part not in parts:
            parts.add(part)
            centres.append([j for j in part if bool(reach[list(part), j].all())])
    return centres


def reach_depth(mask: Tensor, source: int, sink: int) -> int | None:
    """Layers until token ``source`` can influence token ``sink``: 0 for itself, None if it never can."""
    n = _square(mask)
    here = torch.zeros(n, dtype=torch.bool)
    here[source] = True
    for depth in range(n + 1):
        if bool(here[sink]):
            return depth
        here = here | (mask & here[None]).any(1)
    return None


def _square(mask: Tensor) -> int:
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != torch.bool:
        raise ValueError(f"a mask must be bool [n, n], got {mask.dtype} {list(mask.shape)}")
    return mask.size(0)
