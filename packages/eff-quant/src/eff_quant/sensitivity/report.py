"""The result of a sweep: what each pass cost, what was seen at each layer, and what to make of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eff_kernels.edit import Record

from eff_quant.sensitivity.measure import FUSED, Layer
from eff_quant.sensitivity.recipe import Recipe, make_recipe
from eff_quant.sensitivity.score import interval, mean

Mode = Literal["base", "full", "component", "block", "grid", "mixed"]
Direction = Literal["only", "restore"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the model over all windows with some layers rounded.

    Attributes:
        mode: ``"base"`` (nothing rounded), ``"full"`` (all layers), ``"mixed"`` (formats by layer), or what was singled
            out.
        direction: ``"only"`` that part is rounded, or all but that part (``"restore"``).
        format: Of the rounded layers; the name of a mixture; empty for the base.
        block, component: The part.
        nll, kl: Sums in nats over the tokens of each segment, see `SensitivityReport.counts`.
    """

    mode: Mode
    direction: Direction
    format: str
    block: int | None
    component: str | None
    nll: tuple[float, ...]
    kl: tuple[float, ...]

    @property
    def part(self) -> str:
        """Its part in words."""
        words = [] if self.block is None else [f"block {self.block}"]
        words += [] if self.component is None else [self.component]
        return " ".join(words) or {"base": "nothing", "full": "all"}.get(self.mode, self.mode)


@dataclass(frozen=True, slots=True)
class SensitivityReport(Record):
    """What `sensitivity_sweep` found; it saves as JSON.

    Attributes:
        passes: The runs; the first is the base.
        layers: What was seen at each layer of the unchanged model.
        counts: Tokens of each segment; the sums of passes are over these.
        formats, blocks, components: What was swept.
        weights, activations: What was rounded.
        num_bytes: Of the text that the counted tokens stand for, if it was given.
        skipped: Linear layers inside blocks that were left alone, with the reason.
        meta: Anything else that is to be kept with it.
    """

    passes: tuple[Pass, ...]
    layers: tuple[Layer, ...]
    counts: tuple[int, ...]
    formats: tuple[str, ...]
    blocks: tuple[str, ...]
    components: tuple[str, ...]
    weights: bool
    activations: bool
    num_bytes: int | None
    skipped: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def select(
        self,
        mode: Mode | None = None,
        direction: Direction | None = None,
        *,
        format: str | None = None,
        block: int | None = None,
        component: str | None = None,
    ) -> list[Pass]:
        """Passes that fit every argument given."""
        wanted = {"mode": mode, "direction": direction, "format": format, "block": block, "component": component}
        wanted = {k: v for k, v in wanted.items() if v is not None}
        return [p for p in self.passes if all(getattr(p, k) == v for k, v in wanted.items())]

    def full(self, format: str) -> Pass:
        """The pass with every layer rounded."""
        return self._only(self.select("full", format=format), f"full pass of {format!r}")

    @property
    def base(self) -> Pass:
        """The pass with nothing rounded."""
        return self._only(self.select("base"), "base pass")

    @staticmethod
    def _only(found: list[Pass], what: str) -> Pass:
        if not found:
            raise ValueError(f"the report has no {what}")
        return found[0]

    def kl(self, p: Pass) -> float:
        """Mean KL divergence of the base to this pass, in nats a token."""
        return mean(p.kl, self.counts)

    def kl_interval(self, p: Pass, *, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of `kl` over segments of the text."""
        return interval(p.kl, self.counts, level=level)

    def nll(self, p: Pass) -> float:
        """Mean negative log-likelihood, in nats a token."""
        return mean(p.nll, self.counts)

    def nll_change(self, p: Pass) -> float:
        """Difference of `nll` to the base."""
        return self.nll(p) - self.nll(self.base)

    def nll_interval(self, p: Pass, *, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of `nll_change`, paired by segment."""
        change = [a - b for a, b in zip(p.nll, self.base.nll, strict=True)]
        return interval(change, self.counts, level=level)

    def perplexity(self, p: Pass) -> float:
        """Perplexity: exp of `nll`."""
        return math.exp(self.nll(p))

    def bits_per_byte(self, p: Pass) -> float:
        """`nll` in bits by byte of text, which does not depend on the tokenizer."""
        if self.num_bytes is None:
            raise ValueError("bits per byte need the size of the text; give num_bytes to sensitivity_sweep")
        return math.fsum(p.nll) / math.log(2) / self.num_bytes

    def gain(self, p: Pass) -> float:
        """KL that leaving the part of a restoring pass alone saves, against the full pass."""
        return self.kl(self.full(p.format)) - self.kl(p)

    def rank(self, mode: Mode, format: str, direction: Direction = "only") -> list[Pass]:
        """Passes of one kind, the part that costs most first: by KL, or by `gain` for ``"restore"``."""
        found = self.select(mode, direction, format=format)
        return sorted(found, key=self.kl, reverse=direction == "only")

    def estimates(self, format: str) -> dict[tuple[int, str], float]:
        """KL of each layer by block and component: as measured in grid mode, else estimated.

        The estimate divides the block's measured KL by the squared errors that its layers make at the block's output,
        each alone.

        Raises:
            ValueError: a layer is in neither the grid nor a block that was measured, or the format was not swept.
        """
        if format not in self.formats:
            raise ValueError(f"format {format!r} was not swept; the report has {', '.join(map(repr, self.formats))}")
        measured = {(p.block, p.component): self.kl(p) for p in self.select("grid", "only", format=format)}
        of_block = {p.block: self.kl(p) for p in self.select("block", "only", format=format)}
        total: dict[int, float] = {}
        for layer in self.layers:
            total[layer.block] = total.get(layer.block, 0.0) + layer.block_error[format]
        found: dict[tuple[int, str], float] = {}
        for layer in self.layers:
            key = (layer.block, layer.component)
            if key in measured:
                found[key] = measured[key]
            elif layer.block in of_block:
                share = layer.block_error[format] / (total[layer.block] or 1.0)
                found[key] = found.get(key, 0.0) + of_block[layer.block] * share
            else:
                raise ValueError(
                    f"{layer.name}: no pass in {format!r} over its block; sweep with mode 'block' or 'grid'"
                )
        return found

    def table(self, mode: Mode | None = None) -> str:
        """Passes as text: KL with its 95 % interval, change of the loss, perplexity, and bits per byte if known."""
        head = ["format", "rounded", "KL", "95 % interval", "change of loss", "perplexity"]
        head += [] if self.num_bytes is None else ["bits per byte"]
        rows = [head]
        for p in self.passes:
            if mode is None or p.mode == mode:
                low, high = self.kl_interval(p)
                row = [
                    p.format or "-",
                    f"all but {p.part}" if p.direction == "restore" else p.part,
                    f"{self.kl(p):.3g}",
                    f"{low:.3g} to {high:.3g}",
                    f"{self.nll_change(p):+.4f}",
                    f"{self.perplexity(p):.3f}",
                ]
                rows.append(row + ([] if self.num_bytes is None else [f"{self.bits_per_byte(p):.4f}"]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return "\n".join("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def heatmap(self, path: str | Path, format: str) -> None:
        """Draw the KL of every block and component into a file; needs matplotlib."""
        from eff_quant.sensitivity.plot import heatmap

        heatmap(self, path, format)

    def recipe(
        self,
        format: str,
        *,
        budget_bytes: float | None = None,
        budget_kl: float | None = None,
        fallback: str = "fp8",
        kept_bits: int = 16,
        fuse: tuple[tuple[str, ...], ...] = FUSED,
    ) -> Recipe:
        """Choose a precision for every layer, see `eff_quant.sensitivity.recipe.make_recipe`."""
        budget = {"budget_bytes": budget_bytes, "budget_kl": budget_kl}
        return make_recipe(self, format, **budget, fallback=fallback, kept_bits=kept_bits, fuse=fuse)
