"""The verb: `sensitivity_sweep` runs a model with parts of it rounded, one part after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from eff_kernels.edit import Where, evaluating, matches
from torch import Tensor, nn

from eff_quant.sensitivity.fake import FORMATS, check_format, weight_of
from eff_quant.sensitivity.parts import Part, Parts, find_parts
from eff_quant.sensitivity.passes import Runner
from eff_quant.sensitivity.records import Progress, Records, Shown, Step, fingerprint
from eff_quant.sensitivity.report import Direction, Mode, SensitivityReport
from eff_quant.sensitivity.score import segments

FALLBACK = "fp8"


def sensitivity_sweep(
    model: nn.Module,
    windows: Tensor | Sequence[Tensor],
    *,
    formats: Sequence[str] = ("mxfp4", "nvfp4"),
    modes: Sequence[str] = ("component", "block"),
    directions: Sequence[str] = ("only", "restore"),
    components: Sequence[str] | None = None,
    where: Where = "*",
    blocks: str | None = None,
    weights: bool = True,
    activations: bool = True,
    num_bytes: int | None = None,
    grid_top: int = 16,
    mixed: Mapping[str, Mapping[str, str]] | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    cache_bytes: int = 2**31,
) -> SensitivityReport:
    """Measure what rounding each part of a decoder to a low-precision format costs (arXiv 2603.08747).

    A part is a component (one kind of linear layer, in all blocks), a block (all its linear layers), or one component
    of one block. It is rounded alone (``"only"``), or everything but it is (``"restore"``). The model is compared with
    itself on identical tokens; nothing of it is changed when the sweep ends, also by an error or Ctrl-C.

    Args:
        model: A decoder that takes token ids [1, T] and returns logits, such as those of transformers.
        windows: Token ids, [N, T] or several [T]. Each window is run by itself; its first token is context only.
        formats: ``"mxfp4"``, ``"nvfp4"``, ``"fp8"``, ``"int8"``.
        modes: Of ``"component"``, ``"block"`` and ``"grid"``. The grid holds the error of every layer at the output of
            its block, and a run for those ``grid_top`` that an estimate from it finds worst (with mode ``"block"``; the
            estimate divides each block's KL by these errors).
        directions: Of ``"only"`` and ``"restore"``; the grid has ``"only"``.
        components: Components to sweep, such as ``("up_proj", "down_proj")``; the others are never rounded.
        where: Layers to sweep, see `eff_kernels.matches`; the others are never rounded.
        blocks: Pattern of the blocks' names, if they are not found by themselves.
        weights: Round weights.
        activations: Round the inputs of layers (W4A4), each window by itself.
        num_bytes: Of the text behind the tokens that count, for bits per byte.
        grid_top: How many single layers are run by themselves in mode ``"grid"``.
        mixed: More runs, by a name for each: format by layer pattern, the first that fits. `Recipe.quantized` is such.
        resume: A file of JSON lines that takes each finished run, and from which those are read that the same model,
            tokens and formats gave before.
        progress: Called as ``progress(done, total, text)``. By default a line on the terminal.
        cache_bytes: For hidden states, logits and rounded weights that are kept, see `Runner`. Results do not depend on
            it.

    Returns:
        All runs, and what was seen at each layer.

    Raises:
        ValueError: an unknown format, mode, direction or component, a layer whose width the format's groups do not
            divide, or no windows of two tokens or more.
    """
    _check_choices("modes", modes, ("component", "block", "grid"))
    _check_choices("directions", directions, get_args(Direction))
    if not (weights or activations):
        raise ValueError("weights=False and activations=False round nothing; use one or both")
    for format in (*formats, *(f for m in (mixed or {}).values() for f in m.values())):
        check_format(format)
    parts = _chosen(find_parts(model, blocks=blocks, where=where), components)
    _check_widths(parts, formats)
    ids = _checked_windows(windows, next((p.device for p in model.parameters()), torch.device("cpu")))
    runner = Runner(model, ids, parts, weights=weights, activations=activations, cache_bytes=cache_bytes)
    steps = _steps(parts, formats, modes, directions)
    steps += [_mixed_step(parts, name, rules) for name, rules in (mixed or {}).items()]
    records = Records(resume, fingerprint(model, ids, weights, activations))
    seen = tuple(dict.fromkeys((*formats, FALLBACK)))
    grid = grid_top if "grid" in modes else 0
    show = Shown(progress, len(steps) + 1 + min(grid, len(parts.linears)) * len(formats))
    with evaluating(model):
        layers = records.layers(runner, seen, show)
        passes = [records.run(runner, step, show) for step in steps]
        report = SensitivityReport(
            tuple(passes),
            tuple(layers),
            tuple(b - a for w in ids for a, b in segments(len(w))),
            tuple(formats),
            parts.blocks,
            parts.components,
            weights,
            activations,
            num_bytes,
            dict(parts.skipped),
            {"model": type(model).__name__, "torch": torch.__version__, "eff_kernels": version("eff-kernels")},
        )
        if not grid:
            return report
        more = [records.run(runner, s, show) for f in formats for s in _grid_steps(report, parts, f, grid)]
    return replace(report, passes=report.passes + tuple(more))


def _steps(parts: Parts, formats: Sequence[str], modes: Sequence[str], directions: Sequence[str]) -> list[Step]:
    steps = [Step("base", "only", "", None, None, {})]
    singled: list[tuple[Mode, int | None, str | None]] = []
    if "component" in modes:
        singled += [("component", None, c) for c in parts.components]
    if "block" in modes:
        singled += [("block", b, None) for b in sorted({p.block for p in parts.linears})]
    for f in formats:
        steps.append(Step("full", "only", f, None, None, {p.name: f for p in parts.linears}))
        for direction in (d for d in get_args(Direction) if d in directions):
            steps += [_step(parts, mode, direction, f, block, component) for mode, block, component in singled]
    return steps


def _step(
    parts: Parts, mode: Mode, direction: Direction, format: str, block: int | None, component: str | None
) -> Step:
    """Round one part, or all but it."""

    def inside(p: Part) -> bool:
        return block in (None, p.block) and component in (None, p.component)

    chosen = {p.name: format for p in parts.linears if inside(p) == (direction == "only")}
    return Step(mode, direction, format, block, component, chosen)


def _grid_steps(report: SensitivityReport, parts: Parts, format: str, count: int) -> list[Step]:
    """The single layers that the estimate finds worst; without runs over blocks, those with the largest error."""
    if report.select("block", "only", format=format):
        cost = report.estimates(format)
    else:
        cost = {(la.block, la.component): la.block_error[format] for la in report.layers}
    worst = sorted(cost, key=lambda key: -cost[key])[:count]
    return [_step(parts, "grid", "only", format, block, component) for block, component in worst]


def _mixed_step(parts: Parts, name: str, rules: Mapping[str, str]) -> Step:
    found = {}
    for p in parts.linears:
        rule = next((r for r in rules if matches(p.name, r)), None)
        if rule is not None:
            found[p.name] = rules[rule]
    return Step("mixed", "only", name, None, None, found)


def _chosen(parts: Parts, components: Sequence[str] | None) -> Parts:
    if components is None:
        return parts
    _check_choices("components", components, parts.components)
    kept = tuple(p for p in parts.linears if p.component in components)
    return Parts(parts.blocks, tuple(c for c in parts.components if c in components), kept, parts.skipped)


def _check_choices(name: str, given: Iterable[str], known: Sequence[str]) -> None:
    if isinstance(given, str):
        raise TypeError(f"{name}={given!r} is one string; use a tuple, such as ({given!r},)")
    if wrong := [g for g in given if g not in known]:
        raise ValueError(f"{name} has {wrong[0]!r}; use some of {', '.join(map(repr, known))}")


def _check_widths(parts: Parts, formats: Sequence[str]) -> None:
    for f in formats:
        for p in parts.linears:
            width = weight_of(p.module).shape[1]
            if width % FORMATS[f].group:
                raise ValueError(
                    f"{p.name} has in_features={width}, which groups of {FORMATS[f].group} ({f}) do not divide; "
                    f"leave it out by components= or where="
                )


def _checked_windows(windows: Tensor | Sequence[Tensor], device: torch.device) -> list[Tensor]:
    found = [torch.as_tensor(w, device=device) for w in windows]
    for w in found:
        if w.ndim != 1 or len(w) < 2 or w.is_floating_point():
            raise ValueError(f"a window of shape {list(w.shape)} and {w.dtype}; use two token ids or more, [T]")
    if not found:
        raise ValueError("no windows; give token ids as [N, T] or as several [T]")
    return found
