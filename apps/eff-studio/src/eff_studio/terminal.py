"""The commands that do one piece of work and end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eff_studio.engine import Progress as Step
from eff_studio.engine import Result, StudioModel, run_work
from eff_studio.store.pictures import Rejected, read_picture, write_png
from eff_studio.work import Work, described


def do(model: StudioModel, work: Work, out: Path, *, files: dict[str, Path] | None = None) -> int:
    """Do the work with a progress bar and write its pictures; 1 if it does not fit, with the reason.

    Args:
        model: The model.
        work: What to do; pictures are named by the keys of ``files``.
        out: File of the picture; with several, -1, -2 ... are added to its name.
        files: Pictures of the work by the names that it uses.
    """
    opened = _open_all(files or {})
    try:
        with _Bar() as report:
            result = run_work(model, work, open_picture=opened.__getitem__, report=report, cancelled=lambda: False)
    except (ValueError, TypeError) as error:
        print(f"eff-studio: {error}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 1
    for path in write(result, work, out):
        print(path)  # noqa: T201 - a command's answer
    if result.facts:
        print(json.dumps(result.facts))  # noqa: T201 - a command's answer
    return 0


def write(result: Result, work: Work, out: Path) -> list[Path]:
    """Write pictures with their settings inside; the paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(result.images):
        path = out if len(result.images) == 1 else out.with_stem(f"{out.stem}-{i + 1}")
        write_png(image, path, described(work))
        paths.append(path)
    return paths


def _open_all(files: dict[str, Path]) -> dict[str, Image.Image]:
    found = {}
    for name, path in files.items():
        try:
            found[name] = read_picture(path.read_bytes())
        except (OSError, Rejected) as error:
            sys.exit(f"eff-studio: {path}: {error}")
    return found


class _Bar:
    """A progress bar that takes the engine's reports."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.completed}/{task.total} steps"), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, transient=True)
        self.task = self.progress.add_task("", total=None)

    def __enter__(self) -> Callable[[Step], None]:
        self.progress.start()
        return lambda step: self.progress.update(self.task, completed=step.step, total=step.steps)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
