"""Judge a run's best checkpoint; the exit code is 1 if a threshold does not hold."""

from __future__ import annotations

import json
import operator
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

COMPARISONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Judge a run's model by its recipe's evaluation, and compare with thresholds.

    Attributes:
        run: Folder of the run.
        checkpoint: best, last, or a number of updates.
        require: Thresholds such as "accuracy>=0.95" or "loss<=0.1"; they go before the recipe's own of the same metric.
        device: auto, cpu, cuda or cuda:N.
    """

    run: tyro.conf.Positional[Path]
    checkpoint: str = "best"
    require: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    device: str = "auto"


def main(argv: Sequence[str]) -> int:
    """Run ``eff-train evaluate RUN [options]``: prints and writes ``evaluation.json``; 1 if a bound fails."""
    args = tyro.cli(Evaluate, args=list(argv), prog="eff-train evaluate")
    from eff_train.commands._common import opened
    from eff_train.errors import Refused, refusing

    with refusing():
        wanted = dict(parse_threshold(text) for text in args.require)

    with opened(args.run, args.checkpoint, args.device, ["evaluate", *argv]) as (run, recipe, model, found):
        values = dict(recipe.evaluate(model))
    wanted = {**recipe.thresholds, **wanted}
    if unknown := sorted(wanted.keys() - values.keys()):
        raise Refused(f"no metric {', '.join(unknown)}; the evaluation gives {', '.join(sorted(values))}")
    verdicts = {name: holds(values[name], bound) for name, bound in wanted.items()}
    record = {
        "checkpoint": found.folder.name,
        "metrics": values,
        "thresholds": {n: {"bound": " ".join(map(str, b)), "holds": verdicts[n]} for n, b in wanted.items()},
    }
    run.evaluation.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(f"{found.folder.name}\n")
    for name, value in values.items():
        bound = (
            f"  {'holds' if verdicts[name] else 'FAILS'}: {' '.join(map(str, wanted[name]))}" if name in wanted else ""
        )
        sys.stdout.write(f"{name:<28}{value:.6g}{bound}\n")
    return 0 if all(verdicts.values()) else 1


def parse_threshold(text: str) -> tuple[str, tuple[str, float]]:
    """Read ``"accuracy>=0.95"``.

    Raises:
        ValueError: it is not a name, ``>=`` or ``<=``, and a number.
    """
    match = re.fullmatch(r"\s*([\w./-]+?)\s*(>=|<=)\s*(\S+)\s*", text)
    if not match:
        raise ValueError(f"a threshold is written as accuracy>=0.95 or loss<=0.1, got {text!r}")
    return match[1], (match[2], float(match[3]))


def holds(value: float, bound: tuple[str, float]) -> bool:
    """Whether a value keeps a bound; nan keeps none."""
    return bool(COMPARISONS[bound[0]](value, bound[1]))
