"""Sensitivity of SmolLM2-135M-Instruct to FP4, part by part, and what a recipe made from it is worth.

    uvx nox -s bench -- quant sensitivity [--model FOLDER] [--windows 8] [--minutes 10]

Windows of 512 tokens of documentation (`_text.py`) are scored in float32 with weights and activations of the linear
layers rounded (W4A4): each component, each block, the single layers that cost most, and mixtures of formats that fit a
number of bits a weight. The weights come from a 4-bit file, so it is rounding of both that is judged.

Each finished run is kept in the cache; ``--minutes`` ends after that time, and the next call goes on. With everything
measured the report and pictures are written. ``--plot`` draws the report that is there and ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import _smollm2
import torch
from eff_quant import SensitivityReport, sensitivity_sweep
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
            run(args).to_json(args.results)
        except (KeyboardInterrupt, TimeUp):
            sys.exit("stopped; the next call goes on with the run that was under way")
    plot(SensitivityReport.from_json(args.results))


def run(args: argparse.Namespace) -> SensitivityReport:
    from transformers import AutoModelForCausalLM

    folder = args.model or _smollm2.folder()
    text = Measurement(folder, args.windows, args.results)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = time.monotonic() + 60 * args.minutes
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True)) as bar:
        task = bar.add_task("")

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)
            if time.monotonic() > ends:
                raise TimeUp

        def sweep(**more) -> SensitivityReport:
            return sensitivity_sweep(
                model,
                text.windows,
                formats=FORMATS,
                modes=("component", "block", "grid"),
                num_bytes=text.bytes,
                resume=_smollm2.cache() / "sensitivity.jsonl",
                progress=show,
                **more,
            )

        report = sweep(mixed=mixtures(sweep()))
    return with_meta(report, {"model": folder.name, "text": [s.name for s in text.sources], **environment()})


def with_meta(report: SensitivityReport, more: dict) -> SensitivityReport:
    values = {name: getattr(report, name) for name in report.__dataclass_fields__}
    return SensitivityReport(**{**values, "meta": {**report.meta, **more}})


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


if __name__ == "__main__":
    main()
