"""Train a recipe from the start, into a new run folder."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from eff_train.registry import recipes


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the run goes and where its options come from.

    Attributes:
        folder: Folder of the run; by default a new one under runs/, named by recipe and time.
        config: YAML file with options, as a run folder's config.yaml; options of the command line go before it.
        print_config: Print the options as YAML and end.
    """

    folder: Path | None = None
    config: Path | None = None
    print_config: bool = False


def main(argv: Sequence[str]) -> int:
    """Run ``eff-train run RECIPE [options]``."""
    if not argv or argv[0] in ("-h", "--help"):
        names = "".join(f"  {e.name:<28}{e.summary}\n" for e in recipes().values())
        text = (
            "usage: eff-train run RECIPE [options]\n\nTrain a recipe. RECIPE is one of these, or a Python file that "
            f"defines one;\neff-train run RECIPE --help shows its options.\n\n{names}"
        )
        (sys.stdout if argv else sys.stderr).write(text)
        return 0 if argv else 2
    name, words = argv[0], list(argv[1:])
    if name.endswith(".py"):
        name = str(Path(name).resolve())
    from eff_train.commands._common import import_recipe, need
    from eff_train.errors import refusing
    from eff_train.frame.config import dump_yaml
    from eff_train.frame.runs import config_record

    cls = import_recipe(name, ["run", *argv])
    with refusing():
        place, config = parse(cls.config_class, name, words)
    if place.print_config:
        sys.stdout.write(dump_yaml(config_record(name, config)))
        return 0
    need(cls.needs, ["run", *argv])
    return start(name, cls, config, place.folder)


def start(name: str, cls: Any, config: Any, folder: Path | None) -> int:
    """Make the run folder and train."""
    from eff_train.errors import refusing
    from eff_train.frame.loop import train
    from eff_train.frame.parallel import workers
    from eff_train.frame.runs import Run, create, new_folder

    with workers(config.device, config.parallel) as ranks:
        run = Run(ranks.tell(folder or new_folder(name)))
        if ranks.main:
            with refusing():
                create(run.folder, name, config, command(name, config, ranks.count))
            sys.stderr.write(f"run folder: {run.folder}\n")
        return train(cls(config, ranks.device), run, ranks, title=name)


def command(name: str, config: Any, processes: int) -> str:
    """The command that trains the same again, spelled out with all options that are not the recipe's defaults."""
    from eff_train.frame.config import options

    program = ["eff-train"]
    if processes > 1:
        program = ["torchrun", f"--nproc-per-node={processes}", "-m", "eff_train"]
    return shlex.join([*program, "run", name, *options(config, type(config)())])


def parse(config_class: type, name: str, words: list[str]) -> tuple[Place, Any]:
    """Options of the command line over those of ``--config FILE`` over the recipe's defaults.

    Raises:
        ValueError: the file has unknown keys or is another recipe's.
    """
    default = _from_file(config_class, name, words)
    place = tyro.conf.OmitArgPrefixes[Place]
    both = dataclasses.make_dataclass(
        "Run",
        [
            ("place", place, dataclasses.field(default=Place())),
            ("options", Annotated[config_class, tyro.conf.arg(name="")], dataclasses.field(default=default)),
        ],
        frozen=True,
        kw_only=True,
    )
    both.__doc__ = f"Train the recipe {name}."
    found: Any = tyro.cli(both, args=words, prog=f"eff-train run {name}")
    return found.place, found.options


def _from_file(config_class: type, name: str, words: list[str]) -> Any:
    from eff_train.frame.config import from_plain, read_yaml
    from eff_train.frame.runs import check_version

    for i, word in enumerate(words):
        if (word == "--config" and i + 1 < len(words)) or word.startswith("--config="):
            path = Path(words[i + 1] if word == "--config" else word.partition("=")[2])
            data = check_version(read_yaml(path), path)
            if data["recipe"] != name:
                raise ValueError(f"{path} holds options of the recipe {data['recipe']!r}, not of {name!r}")
            return from_plain(config_class, data["config"], str(path))
    return config_class()
