"""The folder of a run: config, environment, code version, metrics, checkpoints and the command that repeats it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from eff_train.frame import checkpoint
from eff_train.frame.checkpoint import Checkpoint
from eff_train.frame.config import from_plain, read_yaml, to_plain, write_yaml
from eff_train.frame.options import TrainConfig

VERSION = 1


@dataclass(frozen=True)
class Run:
    """Paths of a run folder."""

    folder: Path

    @property
    def config_file(self) -> Path:
        """The recipe's name and all options, YAML."""
        return self.folder / "config.yaml"

    @property
    def metrics(self) -> Path:
        """JSON lines."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder each."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """Pictures and texts, one folder for each time."""
        return self.folder / "samples"

    @property
    def evaluation(self) -> Path:
        """What `eff-train evaluate` found last, JSON."""
        return self.folder / "evaluation.json"

    def recipe_name(self) -> str:
        """Name (or file) of the run's recipe."""
        return str(self._config()["recipe"])

    def config(self, cls: type[TrainConfig]) -> TrainConfig:
        """The run's options."""
        return from_plain(cls, self._config()["config"], str(self.config_file))

    def _config(self) -> dict[str, Any]:
        if not self.config_file.is_file():
            raise ValueError(f"{self.folder} is not a run folder: it has no {self.config_file.name}")
        return check_version(read_yaml(self.config_file), self.config_file)


def check_version(data: dict[str, Any], where: Path) -> dict[str, Any]:
    """The content of a config file, if it has the parts and the version that this program reads."""
    if set(data) != {"version", "recipe", "config"}:
        raise ValueError(f"{where} has the keys {', '.join(map(str, data))}; wanted version, recipe, config")
    if data["version"] != VERSION:
        raise ValueError(f"{where} is in format {data['version']}, this program reads {VERSION}")
    return data


def config_record(recipe: str, config: TrainConfig) -> dict[str, Any]:
    """What a config file holds."""
    return {"version": VERSION, "recipe": recipe, "config": to_plain(config)}


def create(folder: Path, recipe: str, config: TrainConfig, command: str) -> Run:
    """Make the folder of a new run and write down how it is made.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; give another --folder, or: eff-train resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder)
    write_yaml(run.config_file, config_record(recipe, config))
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    (folder / "command.txt").write_text(command + "\n")
    return run


def new_folder(recipe: str) -> Path:
    """A name for a run's folder under ``runs/``, from recipe and time; a file's name stands for a recipe in a file."""
    stem = re.sub(r"[^\w.-]+", "-", Path(recipe).stem if recipe.endswith(".py") else recipe)
    base = Path("runs") / f"{stem}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    return next(p for i in range(1000) if not (p := base if not i else Path(f"{base}-{i}")).exists())


def environment() -> dict[str, Any]:
    """Where and by what a run is made: machine, versions, code."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch_threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "code": code_version(),
        "packages": dict(sorted({d.name: d.version for d in distributions() if d.name}.items())),
    }


def code_version(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """Commit of the checkout that holds ``folder`` (this file's) and whether files differ; empty outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def write_checkpoint(run: Run, state: dict[str, Any], record: dict[str, Any]) -> Checkpoint:
    """Write a training's state: weights and averages as safetensors, the rest in torch's format.

    Raises:
        OSError: as `checkpoint.save`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        rest = {k: v for k, v in state.items() if k not in ("weights", "average")}
        try:
            save_file(state["weights"], folder / "weights.safetensors")
            if state["average"]:
                save_file(state["average"], folder / "average.safetensors")
            torch.save(rest, folder / "state.pt")
        except (SafetensorError, RuntimeError) as error:
            # Both libraries have errors of their own for a disk that is full.
            raise OSError(str(error).partition("\n")[0]) from error

    return checkpoint.save(run.checkpoints, state["step"], write, record)


def read_checkpoint(found: Checkpoint) -> dict[str, Any]:
    """The state that `write_checkpoint` wrote."""
    from safetensors.torch import load_file

    state = torch.load(found.folder / "state.pt", map_location="cpu", weights_only=True)
    average = found.folder / "average.safetensors"
    weights = load_file(found.folder / "weights.safetensors")
    return {**state, "weights": weights, "average": load_file(average) if average.exists() else {}}


def choose_checkpoint(run: Run, which: str, best: str, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that ``best``, ``last`` or a number of updates names.

    Raises:
        ValueError: there is none.
    """
    if which in ("best", "last"):
        found = checkpoint.best(run.checkpoints, best if which == "best" else "", say)
        if found is None:
            raise ValueError(f"{run.folder} has no checkpoint yet")
        return found
    if not which.isdecimal():
        raise ValueError(f"a checkpoint is named best, last or by a number of updates, got {which!r}")
    folder = run.checkpoints / f"step-{int(which):08d}"
    if not folder.is_dir():
        steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in checkpoint.folders(run.checkpoints))
        raise ValueError(f"{run.folder} has no checkpoint of update {which}; it has {steps or 'none'}")
    return checkpoint.check(folder)


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Keep other processes from training in the same folder.

    Raises:
        ValueError: one does already.
    """
    with (run.folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is training in {run.folder}") from None
        yield
