"""Folders of files that are whole or not there: written under another name, renamed, and checked by checksum."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished-"


class DamagedCheckpointError(ValueError):
    """A checkpoint folder is not what was written; the message says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: the update it was taken after, and what its manifest records."""

    folder: Path
    step: int
    record: Mapping[str, Any]


def save(root: Path, step: int, write: Callable[[Path], None], record: Mapping[str, Any]) -> Checkpoint:
    """Make the checkpoint of ``step`` under ``root``. It appears under its name only when all of it is on the disk.

    Args:
        root: Folder of checkpoints; made if missing.
        step: Updates done.
        write: Writes the files into the folder that it is given.
        record: Goes into the manifest (JSON).

    Raises:
        OSError: the disk is full or not writable. Nothing is left behind then, older checkpoints are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, draft = root / f"step-{step:08d}", root / f"{UNFINISHED}{step:08d}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        write(draft)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(draft.iterdir())}
        manifest = {"version": VERSION, "step": step, "files": files, "record": dict(record)}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in draft.iterdir():
            _sync(path)
        _sync(draft)
        if final.exists():
            final.rename(old := root / f"{UNFINISHED}old-{final.name}")
            draft.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            draft.rename(final)
        _sync(root)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Checkpoint(final, step, dict(record))


def check(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and compare every file with it.

    Raises:
        DamagedCheckpointError: a file is missing, cut or changed; the message names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, step, files, record = (manifest[k] for k in ("version", "step", "files", "record"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{folder.name}: {MANIFEST} cannot be read: {error}") from error
    if version != VERSION:
        raise DamagedCheckpointError(f"{folder.name}: written in format {version}, this program reads {VERSION}")
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{folder.name}: {name} is missing")
        if (size := path.stat().st_size) != wanted["bytes"]:
            raise DamagedCheckpointError(f"{folder.name}: {name} has {size} bytes, wanted {wanted['bytes']}")
        if _sha256(path) != wanted["sha256"]:
            raise DamagedCheckpointError(f"{folder.name}: the checksum of {name} differs")
    return Checkpoint(folder, step, record)


def folders(root: Path) -> list[Path]:
    """Checkpoint folders under ``root``, oldest first, unchecked."""
    return sorted(root.glob("step-*")) if root.is_dir() else []


def newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there has been none. Damaged ones are named through ``say``.

    Raises:
        DamagedCheckpointError: there are checkpoints, but none is whole.
    """
    problems = []
    for folder in reversed(folders(root)):
        try:
            found = check(folder)
        except DamagedCheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"damaged checkpoint left aside: {problem}")
        if problems:
            say(f"going back to {folder.name}; the updates after it are computed again")
        return found
    if problems:
        raise DamagedCheckpointError("there is no complete checkpoint: " + "; ".join(problems))
    return None


def best(root: Path, metric: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The whole checkpoint with the best recorded ``metric`` (``+name``, or ``-name`` for less), else the newest."""
    for folder in _by_metric(root, metric):
        try:
            return check(folder)
        except DamagedCheckpointError as error:
            say(f"damaged checkpoint left aside: {error}")
    return newest(root, say)


def best_value(root: Path, metric: str) -> float | None:
    """Best value of ``metric`` in the records of the checkpoints, times -1 where less is better; None without one."""
    values = _by_metric(root, metric)
    return _value(values[0], metric) if values else None


def better(evaluation: Mapping[str, float], metric: str, than: float | None) -> bool:
    """Whether an evaluation has a better value of ``metric`` than `best_value` gave."""
    value = _signed(evaluation, metric)
    return value is not None and (than is None or value > than)


def prune(root: Path, keep: int, metric: str) -> None:
    """Delete all checkpoints but the ``keep`` newest and the best, and what an interrupted `save` has left."""
    kept = {*folders(root)[-keep:], *_by_metric(root, metric)[:1]}
    for folder in folders(root):
        if folder not in kept:
            # Renamed first: a half deleted folder must not look like a checkpoint.
            shutil.rmtree(folder.rename(root / f"{UNFINISHED}old-{folder.name}"), ignore_errors=True)
    clean(root)


def set_aside(root: Path, after: int) -> None:
    """Rename checkpoints later than ``after`` (damaged ones, which `newest` passed over) to ``damaged-step-...``."""
    for folder in folders(root):
        if int(folder.name.removeprefix("step-")) > after:
            shutil.rmtree(aside := root / f"damaged-{folder.name}", ignore_errors=True)
            folder.rename(aside)


def clean(root: Path) -> None:
    """Delete what an interrupted `save` or `prune` has left."""
    for draft in root.glob(f"{UNFINISHED}*"):
        shutil.rmtree(draft, ignore_errors=True)


def _by_metric(root: Path, metric: str) -> list[Path]:
    """Folders whose manifest holds the metric, best first; of equal ones the newer first."""
    if not metric:
        return []
    scored = [(value, f.name, f) for f in folders(root) if (value := _value(f, metric)) is not None]
    return [folder for _, _, folder in sorted(scored, reverse=True)]


def _value(folder: Path, metric: str) -> float | None:
    try:
        return _signed(json.loads((folder / MANIFEST).read_text())["record"]["evaluation"], metric)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _signed(evaluation: Mapping[str, float], metric: str) -> float | None:
    """The value with the sign that makes more better; None where there is none to compare (missing, nan)."""
    value = evaluation.get(metric[1:]) if metric else None
    if value is None or value != value:
        return None
    return -value if metric[0] == "-" else value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
