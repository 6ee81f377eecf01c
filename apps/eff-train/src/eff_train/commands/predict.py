"""Run a trained model on a file of your own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Run a trained model on a file; which kinds of files it takes, its recipe says.

    Attributes:
        run: Folder of the run.
        file: File to read.
        out: Folder for results that are not text; by default predictions/ in the run folder.
        checkpoint: best, last, or a number of updates.
        device: auto, cpu, cuda or cuda:N.
    """

    run: tyro.conf.Positional[Path]
    file: tyro.conf.Positional[Path]
    out: Path | None = None
    checkpoint: str = "best"
    device: str = "auto"


def main(argv: Sequence[str]) -> int:
    """Run ``eff-train predict RUN FILE [options]`` and print the answer."""
    args = tyro.cli(Predict, args=list(argv), prog="eff-train predict")
    from eff_train.commands._common import opened
    from eff_train.errors import Refused
    from eff_train.frame.recipe import Recipe

    if not args.file.exists():
        raise Refused(f"no file {args.file}")

    with opened(args.run, args.checkpoint, args.device, ["predict", *argv]) as (run, recipe, model, _):
        if type(recipe).predict is Recipe.predict:
            raise Refused(f"the recipe {run.recipe_name()} does not predict from a file")
        out = args.out or run.folder / "predictions"
        out.mkdir(parents=True, exist_ok=True)
        sys.stdout.write(recipe.predict(model, args.file, out) + "\n")
    return 0
