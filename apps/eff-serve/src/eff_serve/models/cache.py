"""The folder in which converted models are kept, and the way to fill it without ever leaving half a model."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """``EFF_CACHE_DIR`` if set, else the user's cache folder for eff."""
    return Path(os.environ.get("EFF_CACHE_DIR") or platformdirs.user_cache_dir("eff")) / "models"


def file_hash(path: Path) -> str:
    """First 16 hexadecimal digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block succeeds and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise  # otherwise another process was quicker, with the same result
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
