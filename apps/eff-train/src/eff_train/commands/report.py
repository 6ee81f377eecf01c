"""Write one HTML file about a run: curves, samples, thresholds, the record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a page about a run, finished or not. It needs no other file.

    Attributes:
        run: Folder of the run.
        out: File to write; by default report.html in the run folder.
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None


def main(argv: Sequence[str]) -> int:
    """Run ``eff-train report RUN [options]`` and print where the page is."""
    args = tyro.cli(Report, args=list(argv), prog="eff-train report")
    from eff_train.errors import refusing
    from eff_train.frame.report import write_report
    from eff_train.frame.runs import Run

    run = Run(args.run)
    out = args.out or run.folder / "report.html"
    with refusing():
        run.recipe_name()
        write_report(run, out)
    sys.stdout.write(f"{out}\n")
    return 0
