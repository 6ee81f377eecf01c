"""Write a trained model into a folder, for use elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained model into a folder as its recipe does, with the record of its training.

    Attributes:
        run: Folder of the run.
        folder: New or empty folder for the model.
        checkpoint: best, last, or a number of updates.
    """

    run: tyro.conf.Positional[Path]
    folder: tyro.conf.Positional[Path]
    checkpoint: str = "best"


def main(argv: Sequence[str]) -> int:
    """Run ``eff-train export RUN FOLDER [options]``; ``training.json`` next to the model says how it was made."""
    args = tyro.cli(Export, args=list(argv), prog="eff-train export")
    from eff_train.commands._common import opened
    from eff_train.errors import Refused
    from eff_train.frame.config import read_yaml

    if args.folder.exists() and not (args.folder.is_dir() and not any(args.folder.iterdir())):
        raise Refused(f"{args.folder} exists and is not an empty folder")
    with opened(args.run, args.checkpoint, "cpu", ["export", *argv]) as (run, recipe, model, found):
        args.folder.mkdir(parents=True, exist_ok=True)
        recipe.export(model, args.folder)
        record = {
            "command": (run.folder / "command.txt").read_text().strip(),
            **read_yaml(run.config_file),
            "checkpoint": {"step": found.step, **found.record},
            "evaluation": json.loads(run.evaluation.read_text()) if run.evaluation.exists() else None,
            "environment": json.loads((run.folder / "environment.json").read_text()),
        }
        (args.folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(f"{args.folder}\n")
    return 0
