"""Go on with a run that was stopped or killed, from its newest whole checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run, from its newest whole checkpoint.

    Attributes:
        run: Folder of the run.
        steps: Updates of the weights in all, in place of what the run was started with. The learning rate follows the
            new number, so the result is another than that of an unbroken run.
        max_minutes: Minutes after which this process saves and ends; 0: no limit. By default as the run was started.
        threads: CPU threads; 0: PyTorch's choice. By default as the run was started.
        device: auto, cpu, cuda or cuda:N. By default as the run was started.
    """

    run: tyro.conf.Positional[Path]
    steps: int | None = None
    max_minutes: float | None = None
    threads: int | None = None
    device: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run ``eff-train resume RUN [options]``."""
    args = tyro.cli(Resume, args=list(argv), prog="eff-train resume")
    from eff_train.commands._common import load_recipe
    from eff_train.errors import refusing
    from eff_train.frame.config import write_yaml
    from eff_train.frame.loop import train
    from eff_train.frame.parallel import workers
    from eff_train.frame.runs import Run, config_record

    run = Run(args.run)
    with refusing():
        name = run.recipe_name()
    cls = load_recipe(name, ["resume", *argv])
    changed = {k: v for k in ("steps", "max_minutes", "threads", "device") if (v := getattr(args, k)) is not None}
    with refusing():
        config = dataclasses.replace(run.config(cls.config_class), **changed)
    with workers(config.device, config.parallel) as ranks:
        if ranks.main and changed:
            write_yaml(run.config_file, config_record(name, config))
        return train(cls(config, ranks.device), run, ranks, title=name)
