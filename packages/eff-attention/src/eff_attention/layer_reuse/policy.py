"""What each layer does: the plan that the search makes and the run time follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from eff_kernels.edit import Record

Kind = Literal["full", "anchor", "reuse"]


@dataclass(frozen=True, slots=True)
class LayerReusePolicy(Record):
    """Kind and source of each layer.

    Attributes:
        kind: "full" (dense, left alone), "anchor" (dense, chooses blocks of keys) or "reuse" (attends to blocks that
            its source chose).
        source: The layer whose choice a reusing layer takes, an anchor or a full layer before it; -1 for the others.
        score: What the search says of the plan; more is better.
        meta: How it was found.
    """

    kind: tuple[Kind, ...]
    source: tuple[int, ...]
    score: float = 0.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """See `Settings`."""
        if len(self.kind) != len(self.source):
            raise ValueError(f"kind and source must have one length, got {len(self.kind)}, {len(self.source)}")
        for layer, (kind, source) in enumerate(zip(self.kind, self.source, strict=True)):
            if kind != "reuse" and source != -1:
                raise ValueError(f"layer {layer} is of kind {kind!r} and must have source -1, got {source}")
            if kind == "reuse" and not 0 <= source < layer:
                raise ValueError(f"layer {layer} must reuse one of the layers 0 to {layer - 1}, got source {source}")
            if kind == "reuse" and self.kind[source] == "reuse":
                raise ValueError(f"layer {layer} reuses layer {source}, which chooses nothing itself")

    def summary(self) -> str:
        """One line: how many layers of each kind, then F, A or the source of each layer."""
        plan = (
            "F" if k == "full" else "A" if k == "anchor" else str(s)
            for k, s in zip(self.kind, self.source, strict=True)
        )
        counts = ", ".join(f"{self.kind.count(k)} {k}" for k in get_args(Kind))
        return f"{counts}: {' '.join(plan)}"
