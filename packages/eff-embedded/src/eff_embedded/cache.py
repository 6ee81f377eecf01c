"""The folder in which converted models are kept: filled once, checked by checksum, made again when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

MANIFEST = "checksums.json"
_FORMAT = 1
_BLOCK = 16 * 2**20
_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Folder of converted models: ``models`` in ``EFF_CACHE_DIR`` if that is set, else in the user's cache for eff."""
    return Path(os.environ.get("EFF_CACHE_DIR") or platformdirs.user_cache_dir("eff")) / "models"


def file_hash(path: Path) -> str:
    """SHA-256 over the SHA-256 digests of a file's blocks of 16 MiB, which several threads compute at once."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        starts = range(0, size, _BLOCK)

        def digest(start: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), _BLOCK, start)).digest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return hashlib.sha256(b"".join(pool.map(digest, starts))).hexdigest()


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache, whole; make it first where it is missing or damaged.

    Each file is compared with its checksum on every call, so a folder that was cut, changed or half written is noticed
    and made again. Two processes may ask at once: one makes the folder while the other waits. A process that is killed
    leaves nothing that would be taken for a model.

    Args:
        name: What the content depends on: the asset, the hash of its source, the version of the conversion.
        make: Writes the files into the empty folder that it is given.
    """
    target = cache_dir() / name
    if defect(target) is None:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        found = defect(target)
        if found is None:
            return target
        if target.exists():
            _log.warning("%s is damaged (%s); making it again", target, found)
        for orphan in target.parent.glob(f".{name}-*"):  # of processes that were killed: the lock is ours
            shutil.rmtree(orphan, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            make(scratch)
            write_manifest(scratch)
            if target.exists():
                target.rename(scratch.with_name(scratch.name + "-damaged"))
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(scratch.with_name(scratch.name + "-damaged"), ignore_errors=True)
    return target


def write_manifest(folder: Path) -> None:
    """Write the size and checksum of every file in the folder to checksums.json."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256_16m": file_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1), encoding="utf-8")


def defect(folder: Path) -> str | None:
    """What is wrong with a folder that `cached` made, in words, or None if it is whole."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return f"{MANIFEST} has format {manifest['format']!r}, not {_FORMAT}"
        files = dict(manifest["files"])
    except FileNotFoundError:
        return f"there is no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
    for name, expected in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if file_hash(folder / name) != expected["sha256_16m"]:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
