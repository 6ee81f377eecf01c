"""Reading, checking and adding checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eff_embedded.cache import MANIFEST, defect, write_manifest

MAX_BYTES = 10_000_000
RECORD = "record.json"
RECORD_KEYS = ("command", "data", "seed", "steps", "hours", "machine", "torch", "scores", "licence")
_ROOT = Path(__file__).parent
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*-v[0-9]+")
_TYPES_16_BIT = {"BF16", "F16"}
_WHOLE_NUMBERS = {"BOOL", "U8", "I8", "I16", "I32", "I64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that has been found whole.

    Attributes:
        name: Model and version, such as "smollm2-eyes-v1".
        folder: Its files; what they are is up to the model, ``model.safetensors`` as a rule.
        record: How it came about: the command that repeats it, data, seed, steps, hours, machine, scores, licence.
    """

    name: str
    folder: Path
    record: dict[str, Any]

    def weights(self, file: str = "model.safetensors") -> dict[str, Tensor]:
        """The tensors of one of its files, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.folder / file)


def checkpoints(*, root: Path | None = None) -> tuple[str, ...]:
    """Names of all checkpoints, sorted."""
    return tuple(sorted(path.parent.name for path in (root or _ROOT).glob(f"*/{RECORD}")))


def checkpoint(name: str, *, root: Path | None = None) -> Checkpoint:
    """Find a checkpoint and compare its files with their checksums.

    Args:
        name: One of `checkpoints`.
        root: Folder of checkpoints; the package's own by default.

    Raises:
        FileNotFoundError: there is none of this name.
        ValueError: a file is missing or damaged, so the package must be installed again.
    """
    folder = (root or _ROOT) / name
    if not _NAME.fullmatch(name) or not (folder / RECORD).is_file():
        known = ", ".join(checkpoints(root=root)) or "none"
        raise FileNotFoundError(f"there is no checkpoint {name!r}; known: {known}")
    if found := defect(folder):
        raise ValueError(f"checkpoint {name} is damaged: {found}; install eff-embedded again")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return Checkpoint(name=name, folder=folder, record=record)


def save_checkpoint(
    name: str, write: Callable[[Path], None], record: Mapping[str, Any], *, root: Path | None = None
) -> Checkpoint:
    """Add a checkpoint under a new name.

    Args:
        name: Model and version, small letters and digits with hyphens, such as "smollm2-eyes-v1".
        write: Writes the model's files into the empty folder that it is given.
        record: Values for all of `RECORD_KEYS` and whatever else should be remembered, as JSON can hold it.
        root: Folder of checkpoints; the package's own by default.

    Raises:
        FileExistsError: the name is taken.
        ValueError: the name is not of that form, the record lacks a key, the files are larger than ten million bytes
            together, hold floats of more than 16 bit, or none is a safetensors file.
    """
    root = root or _ROOT
    if not _NAME.fullmatch(name):
        raise ValueError(f"name={name!r}; use lower-case letters, digits and hyphens, and a version: smollm2-eyes-v1")
    if missing := [key for key in RECORD_KEYS if key not in record]:
        raise ValueError(f"the record of {name} lacks {missing}; it must have {RECORD_KEYS}")
    if (root / name).exists():
        raise FileExistsError(f"checkpoint {name} exists already and is never overwritten; use the next version")
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        write(scratch)
        (scratch / RECORD).write_text(json.dumps({"name": name, **record}, indent=1) + "\n", encoding="utf-8")
        _check(scratch)
        write_manifest(scratch)
        scratch.chmod(0o755)
        scratch.rename(root / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return checkpoint(name, root=root)


def _check(folder: Path) -> None:
    from safetensors import safe_open

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"the checkpoint takes {size:,} bytes; the limit is {MAX_BYTES:,}")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{MANIFEST} is reserved for the list of checksums; name the file differently")
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise ValueError("the checkpoint holds no safetensors file")
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                kind = file.get_slice(name).get_dtype()
                if kind not in _TYPES_16_BIT | _WHOLE_NUMBERS:
                    raise ValueError(f"{path.name}: {name} is {kind}; save floats in bfloat16 or float16")
