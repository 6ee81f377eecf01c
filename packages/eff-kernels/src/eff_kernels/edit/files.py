"""Small results in one file: numbers and words as JSON, and with tensors or arrays one safetensors file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from eff_kernels.edit.settings import Settings, fields_of

_KEY = "eff"  # of the JSON text in a safetensors file
_TENSOR = "$tensor"


@dataclass(frozen=True, slots=True)
class Record(Settings):
    """A result that is made once and kept: settings whose fields may hold tensors and NumPy arrays, at any depth.

    `save` writes JSON where nothing is a tensor or an array, else a safetensors file with the rest in its metadata. A
    file appears under its name when it is whole.
    """

    @classmethod
    def _all_tags(cls) -> dict[str, str]:
        return {"record": cls.__name__, **cls.tags}

    def save(self, path: str | Path) -> None:
        """Write the record to exactly this path."""
        tensors: dict[str, Tensor] = {}

        def keep(value: Any, name: str) -> dict[str, str]:
            if type(value).__module__ == "numpy":
                value = torch.from_numpy(value)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}, which cannot be saved")
            # A copy: safetensors refuses tensors that share memory, such as views of one buffer.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {_TENSOR: name}

        text = json.dumps({**self._all_tags(), "version": self.version, **fields_of(self, keep)})
        if not tensors:
            write_whole(path, lambda file: Path(file).write_text(text + "\n", encoding="utf-8"))
            return
        from safetensors.torch import save_file

        write_whole(path, lambda file: save_file(tensors, file, {_KEY: text}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; tensors are on the CPU.

        Raises:
            ValueError: the file is cut short, or holds something else.
        """
        text, tensors = _read(Path(path), cls.__name__)

        def resolve(value: Any) -> Any:
            if isinstance(value, dict):
                if set(value) == {_TENSOR}:
                    return tensors[value[_TENSOR]]
                return {k: resolve(v) for k, v in value.items()}
            return [resolve(v) for v in value] if isinstance(value, list) else value

        try:
            return cls.from_dict(resolve(json.loads(text)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a complete {cls.__name__} file: {error}") from error


def write_whole(path: str | Path, write: Callable[[str], object]) -> None:
    """Let ``write(temporary path)`` write a file, and give it its name when that has returned.

    An earlier file of that name is there until then, and stays if ``write`` raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(str(temporary))
        temporary.chmod(mode)  # safetensors makes files for their owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path, wanted: str) -> tuple[str, dict[str, Tensor]]:
    """The JSON text of a file and its tensors."""
    with path.open("rb") as file:
        start = file.read(8)
    # A safetensors file begins with the length of its header; text read as such a number is longer than any file.
    if len(start) < 8 or int.from_bytes(start, "little") > path.stat().st_size:
        if start[:1] != b"{":
            raise ValueError(f"{path} is not a {wanted} file: it is empty, truncated, or of another format")
        return path.read_text(encoding="utf-8"), {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as held:
            text = (held.metadata() or {}).get(_KEY)
            if text is None:
                raise ValueError(f"{path} is not a {wanted} file: it is a safetensors file of something else")
            return text, {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a {wanted} file, or is truncated: {error}") from error
