"""From a sweep to a model of mixed precision: layers are raised one by one where it helps most for its size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eff_quant.fp4 import FP4Config
from eff_quant.fp8_qat import FP8Config
from eff_quant.llm_int8 import Int8Config
from eff_quant.sensitivity.fake import FORMATS, check_format
from eff_quant.sensitivity.measure import FUSED, Layer

if TYPE_CHECKING:
    from eff_quant.sensitivity.report import SensitivityReport


@dataclass(frozen=True, slots=True)
class Recipe:
    """A format for each linear layer of a model.

    Attributes:
        formats: By layer name; None leaves the layer as it is.
        num_bytes: Of these layers' weights.
        bits: The same, a weight.
        predicted_kl: What the sweep lets expect, in nats a token; no interaction of layers is in it beyond a common
            factor.
        activations: Whether the sweep rounded activations, too; `configs` then asks for it.
    """

    formats: Mapping[str, str | None]
    num_bytes: float
    bits: float
    predicted_kl: float
    activations: bool

    def quantized(self) -> dict[str, str]:
        """The layers that are to be quantised, as `mixed_quality` takes them."""
        return {name: f for name, f in self.formats.items() if f is not None}

    def configs(self) -> dict[str, Any]:
        """Configs by layer name, as `eff_quant.quantize_` takes them; layers that are left alone have none."""
        made = {f: _config(f, self.activations) for f in set(self.quantized().values())}
        return {name: made[f] for name, f in self.quantized().items()}

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for f in self.formats.values():
            counts[f or "as it is"] = counts.get(f or "as it is", 0) + 1
        layers = ", ".join(f"{n} {f}" for f, n in counts.items())
        return f"{self.bits:.2f} bits a weight, predicted KL {self.predicted_kl:.4f}: {layers}"


def make_recipe(
    report: SensitivityReport,
    format: str,
    *,
    budget_bytes: float | None = None,
    budget_kl: float | None = None,
    fallback: str = "fp8",
    kept_bits: int = 16,
    fuse: tuple[tuple[str, ...], ...] = FUSED,
) -> Recipe:
    """Choose a precision for every layer: ``format``, ``fallback``, or as it is.

    All layers begin in ``format``. Again and again the step is taken that saves most KL for each byte that it costs,
    until the next one would exceed ``budget_bytes``, or until the predicted KL is within ``budget_kl``. The KL of a
    layer in ``format`` is that of `SensitivityReport.estimates`; in ``fallback`` it is smaller by the ratio of squared
    errors at the block's output (KL grows with the square of a small error). All are scaled by one factor so that their
    sum is the KL of the full pass.

    Args:
        report: With passes in mode ``"block"`` or ``"grid"``.
        format: The smallest.
        budget_bytes: For the weights of all swept layers.
        budget_kl: In nats a token. One of the two budgets has to be given.
        fallback: The format between ``format`` and the unchanged layer.
        kept_bits: Of one weight of an unchanged layer.
        fuse: Components of a block that serving engines compute as one layer and that get one precision.

    Raises:
        ValueError: no budget or two, a budget that cannot be held, or a format that the sweep did not look at.
    """
    if (budget_bytes is None) == (budget_kl is None):
        raise ValueError(f"budget_bytes={budget_bytes}, budget_kl={budget_kl}; give exactly one of the two")
    check_format(fallback)
    ladder = (format, fallback, None)
    units = _units(report, format, fuse, ladder, kept_bits)
    if budget_bytes is not None and (least := sum(u.sizes[0] for u in units)) > budget_bytes:
        raise ValueError(f"budget_bytes={budget_bytes:g} is below the {least:g} bytes of all layers in {format!r}")
    if budget_kl is not None and budget_kl < 0:
        raise ValueError(f"budget_kl={budget_kl}; use 0 (everything stays as it is) or more")
    level = [0] * len(units)
    size, kl = sum(u.sizes[0] for u in units), math.fsum(u.kl[0] for u in units)
    while budget_kl is None or kl > budget_kl:
        room = math.inf if budget_bytes is None else budget_bytes - size
        steps = [
            (u.saving(level[i], to), i, to) for i, u in enumerate(units) for to in range(level[i] + 1, len(ladder))
        ]
        fitting = [s for s in steps if units[s[1]].sizes[s[2]] - units[s[1]].sizes[level[s[1]]] <= room]
        if not fitting or (budget_kl is None and max(fitting)[0] <= 0):
            break
        _, i, to = max(fitting)
        level[i] = to
        size, kl = (
            math.fsum(v) for v in zip(*((u.sizes[n], u.kl[n]) for u, n in zip(units, level, strict=True)), strict=True)
        )
    formats = {layer.name: ladder[n] for u, n in zip(units, level, strict=True) for layer in u.layers}
    weights = sum(layer.rows * layer.columns for layer in report.layers)
    return Recipe({la.name: formats[la.name] for la in report.layers}, size, 8 * size / weights, kl, report.activations)


@dataclass(frozen=True, slots=True)
class _Unit:
    """Layers that get one precision, with their bytes and KL at each step of the ladder."""

    layers: tuple[Layer, ...]
    sizes: tuple[float, ...]
    kl: tuple[float, ...]

    def saving(self, now: int, to: int) -> float:
        """KL saved for each byte."""
        return (self.kl[now] - self.kl[to]) / (self.sizes[to] - self.sizes[now])


def _units(
    report: SensitivityReport,
    format: str,
    fuse: tuple[tuple[str, ...], ...],
    ladder: tuple[str | None, ...],
    kept_bits: int,
) -> list[_Unit]:
    estimates = report.estimates(format)
    if missing := [la.name for la in report.layers if ladder[1] not in la.block_error]:
        known = ", ".join(map(repr, report.layers[0].block_error))
        raise ValueError(f"fallback {ladder[1]!r} was not measured ({missing[0]}); the report has {known}")
    groups: dict[tuple[int, str], list[Layer]] = {}
    for layer in report.layers:
        fused = next((g for g in fuse if layer.component in g), (layer.component,))
        groups.setdefault((layer.block, fused[0]), []).append(layer)
    made = []
    for layers in groups.values():
        own = math.fsum(estimates[key] for key in {(la.block, la.component) for la in layers})
        error = [math.fsum(0.0 if f is None else la.block_error[f] for la in layers) for f in ladder]
        kl = tuple(own * e / (error[0] or 1.0) for e in error)
        sizes = tuple(sum(_size(la, f, kept_bits) for la in layers) for f in ladder)
        if not sizes[0] < sizes[1] < sizes[2]:
            raise ValueError(f"{ladder[:2]} and {kept_bits}-bit weights: each has to be larger than the one before")
        made.append(_Unit(tuple(layers), sizes, kl))
    total = math.fsum(u.kl[0] for u in made)
    factor = report.kl(report.full(format)) / total if total else 1.0
    return [_Unit(u.layers, u.sizes, tuple(k * factor for k in u.kl)) for u in made]


def _size(layer: Layer, format: str | None, kept_bits: int) -> float:
    if format is None:
        return layer.rows * layer.columns * kept_bits / 8
    return FORMATS[format].size(layer.rows, layer.columns)


def _config(format: str, activations: bool) -> Any:
    if FORMATS[format].bits < 8:
        return FP4Config.from_dict({"format": format, "activations": "dynamic" if activations else None})
    if format == "fp8":
        return FP8Config(activations="dynamic" if activations else "none")
    return Int8Config(threshold=0.0, activation="dynamic" if activations else "none")
