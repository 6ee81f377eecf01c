"""Sensitivity of SmolLM2-135M-Instruct to FP4, part by part, and what a recipe made from it is worth.

    uvx nox -s bench -- quant sensitivity [--model FOLDER] [--windows 8] [--minutes 10]

Windows of 512 tokens of documentation (`_text.py`) are scored in float32 with weights and activations of the linear
layers rounded (W4A4): each component and each block alone and all but it, the single layers that cost most, and
mixtures of formats that fit a number of bits a weight. The weights come from a 4-bit file, so it is rounding of both
that is judged.

Each finished run is kept in the cache; ``--minutes`` ends after that time, and the next call goes on. With everything
measured the report and pictures are written. ``--plot`` draws the report that is there and ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import _smollm2
import torch
from eff_quant import SensitivityReport, sensitivity_sweep
from eff_quant.sensitivity.score import interval, mean
from quality import Measurement, environment
from rich.progress import Progress, TimeRemainingColumn

RESULTS = Path(__file__).parent / "results" / "sensitivity.json"
IMAGES = Path(__file__).parents[3] / "docs" / "images"
FORMATS = ("mxfp4", "nvfp4")
BITS = {"mxfp4": (4.5, 5.0, 5.5, 6.0, 7.0), "nvfp4": (4.75, 5.0, 5.5, 6.0, 7.0)}
COLOURS = {"mxfp4": "tab:orange", "nvfp4": "tab:green"}


class TimeUp(Exception):
    """The slice of time that was given is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="transformers folder with float weights")
    parser.add_argument("--windows", type=int, default=8, help="how many windows of 512 tokens to score")
    parser.add_argument("--minutes", type=float, default=1e9, help="end after so many minutes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the report")
    parser.add_argument("--plot", action="store_true", help="draw the report that is there and end")
    args = parser.parse_args()
    if not args.plot:
        try:
            run(args).save(args.results)
        except (KeyboardInterrupt, TimeUp):
            sys.exit("stopped; the next call goes on with the run that was under way")
    plot(SensitivityReport.load(args.results))


def run(args: argparse.Namespace) -> SensitivityReport:
    from transformers import AutoModelForCausalLM

    folder = args.model or _smollm2.folder()
    text = Measurement(folder, args.windows, args.results, {"float32": {}})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = time.monotonic() + 60 * args.minutes
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True)) as bar:
        task = bar.add_task("")

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)
            if time.monotonic() > ends:
                raise TimeUp

        def sweep(mixed: dict[str, dict[str, str]] | None = None) -> SensitivityReport:
            return sensitivity_sweep(
                model,
                text.windows,
                formats=FORMATS,
                modes=("component", "block", "grid"),
                num_bytes=text.bytes,
                mixed=mixed,
                resume=_smollm2.cache() / "sensitivity.jsonl",
                progress=show,
            )

        report = sweep(mixtures(sweep()))
    meta = {"model": folder.name, "text": [s.name for s in text.sources], **environment()}
    return dataclasses.replace(report, meta={**report.meta, **meta})


def mixtures(report: SensitivityReport) -> dict[str, dict[str, str]]:
    """Recipes for a number of bits a weight, and for comparison the first blocks in FP8 as far as the bits go."""
    weights = sum(la.rows * la.columns for la in report.layers)
    made = {"fp8, all": {la.name: "fp8" for la in report.layers}}
    for format, every in BITS.items():
        made[f"{format}, seed"] = seed(report, format)
        for bits in every:
            made[f"{format}, recipe, {bits}"] = report.recipe(format, budget_bytes=weights * bits / 8).quantized()
            if bits in (5.0, 6.0):
                made[f"{format}, first blocks, {bits}"] = first_blocks(report, format, bits)
    return made


def seed(report: SensitivityReport, format: str) -> dict[str, str]:
    """A rule of thumb: down_proj of the first two blocks and of the last as they are."""
    kept = {0, 1, len(report.blocks) - 1}
    return {la.name: format for la in report.layers if not (la.component == "down_proj" and la.block in kept)}


def first_blocks(report: SensitivityReport, format: str, bits: float) -> dict[str, str]:
    """FP8 for whole blocks from the first on, the rest in ``format``, of at most so many bits a weight."""
    best = {la.name: format for la in report.layers}
    for count in range(len(report.blocks) + 1):
        formats = {la.name: "fp8" if la.block < count else format for la in report.layers}
        if size(report, formats) <= bits:
            best = formats
    return best


def size(report: SensitivityReport, formats: dict[str, str]) -> float:
    """Bits a weight."""
    from eff_quant.sensitivity.fake import FORMATS as TABLE

    total = sum(
        TABLE[formats[la.name]].size(la.rows, la.columns) if la.name in formats else la.rows * la.columns * 2
        for la in report.layers
    )
    return 8 * total / sum(la.rows * la.columns for la in report.layers)


def plot(report: SensitivityReport) -> None:
    """All pictures of the page."""
    for format in report.formats:
        report.heatmap(IMAGES / f"sensitivity_{format}.svg", format)
    plot_components(report, IMAGES / "sensitivity_components.svg")
    plot_depth(report, IMAGES / "sensitivity_depth.svg")
    plot_recipes(report, IMAGES / "sensitivity_recipe.svg")


def plot_components(report: SensitivityReport, path: Path) -> None:
    """KL of each component alone, and what leaving it alone saves, with 95 % intervals."""
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    titles = {"only": "rounded alone: KL", "restore": "all but it rounded: KL saved"}
    for axes, (direction, title) in zip(both, titles.items(), strict=True):
        for i, format in enumerate(report.formats):
            full = report.full(format)
            for y, component in enumerate(report.components):
                found = report.select("component", direction, format=format, component=component)
                if not found:
                    continue
                (p,) = found
                sums = p.kl if direction == "only" else [a - b for a, b in zip(full.kl, p.kl, strict=True)]
                value, (low, high) = mean(sums, report.counts), interval(sums, report.counts)
                label = format if y == 0 else None
                at = y + 0.38 * (i - 0.5)
                axes.barh(at, value, 0.36, color=COLOURS[format], label=label)
                axes.plot([low, high], [at, at], color="black", linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("nats a token")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    both[0].set_yticks(range(len(report.components)), report.components)
    both[0].invert_yaxis()
    both[1].legend()
    figure.savefig(path)


def plot_depth(report: SensitivityReport, path: Path) -> None:
    """KL of each block alone over depth, and what leaving it alone saves."""
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"only": "rounded alone: KL", "restore": "all but it rounded: KL saved"}
    for axes, (direction, title) in zip(both, titles.items(), strict=True):
        for format in report.formats:
            full, passes = report.full(format), report.select("block", direction, format=format)
            if not passes:
                continue
            sums = [
                p.kl if direction == "only" else [a - b for a, b in zip(full.kl, p.kl, strict=True)] for p in passes
            ]
            blocks = [p.block for p in passes]
            limits = [interval(s, report.counts) for s in sums]
            axes.plot(blocks, [mean(s, report.counts) for s in sums], "o-", ms=3, color=COLOURS[format], label=format)
            axes.fill_between(blocks, *zip(*limits, strict=True), color=COLOURS[format], alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("nats a token")
    both[0].set_ylim(bottom=0)
    both[0].legend()
    figure.savefig(path)


def plot_recipes(report: SensitivityReport, path: Path) -> None:
    """KL over size: recipes as measured and as predicted, the first blocks in FP8, and uniform formats."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    weights = sum(la.rows * la.columns for la in report.layers)
    kl = {p.format: report.kl(p) for p in report.select("mixed")} | {f: report.kl(report.full(f)) for f in FORMATS}
    made = {name: formats for name, formats in mixtures(report).items() if name in kl}
    bits = {name: size(report, formats) for name, formats in made.items()}
    bits |= {f: size(report, {la.name: f for la in report.layers}) for f in FORMATS}
    for format in FORMATS:
        names = [format, *(n for n in made if n.startswith(f"{format}, recipe")), "fp8, all"]
        colour = COLOURS[format]
        axes.plot([bits[n] for n in names], [kl[n] for n in names], "o-", color=colour, label=f"{format} recipe")
        recipes = [report.recipe(format, budget_bytes=weights * b / 8) for b in BITS[format]]
        axes.plot([r.bits for r in recipes], [r.predicted_kl for r in recipes], ":", color=colour, label="as predicted")
        for kind, marker in (("first blocks", "s"), ("seed", "^")):
            names = [n for n in made if n.startswith(f"{format}, {kind}")]
            label = {"first blocks": "first blocks in FP8", "seed": "3 down_proj in bfloat16"}[kind]
            axes.plot([bits[n] for n in names], [kl[n] for n in names], marker, mfc="none", color=colour, label=label)
    for name, text in (("mxfp4", "all MXFP4"), ("nvfp4", "all NVFP4"), ("fp8, all", "all FP8")):
        axes.annotate(text, (bits[name], kl[name]), textcoords="offset points", xytext=(6, 3), fontsize=9)
    axes.set_yscale("log")
    axes.set_xlim(4, 8.8)
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("KL (nats a token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path)


if __name__ == "__main__":
    main()
