"""The container: a header, metadata with types, a table of tensors, their data (versions 2 and 3, little-endian).

Nothing in a file is believed before it is checked against the length of the file: a file that was cut off, or made to
crash its readers, gives an error that names it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MOST_ENTRIES = 1 << 16  # of metadata, and of tensors
_MOST_DIMENSIONS = 4
_MOST_NAME = 1 << 10
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Number in a file -> name, elements of a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
BLOCK_BYTES = {name: size for name, _, size in TYPES.values()}


class GGUFError(ValueError):
    """A file is damaged, no GGUF file, or holds what is not read here; the message names it."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: Rows first, as in PyTorch (the file has it the other way round).
        kind: Name of its type, one of `TYPES`.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


class GGUFFile:
    """A file, mapped into memory.

    Attributes:
        metadata: Entries by name.
        tensors: Tensors by name.
        header: All bytes before the data: what the file says of itself.

    Raises:
        FileNotFoundError: there is no such file.
        GGUFError: it is not one that can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise GGUFError(f"{path} is empty") from error
        reader = _Reader(path, self._map)
        if reader.bytes(4) != b"GGUF":
            raise GGUFError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        version = reader.number("I")
        if version not in (2, 3):
            raise GGUFError(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, can be read")
        count, entries = reader.number("Q"), reader.number("Q")
        for what, number in (("tensors", count), ("entries of metadata", entries)):
            if number > _MOST_ENTRIES:
                raise GGUFError(f"{path} says that it has {number} {what}; at most {_MOST_ENTRIES} are read")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = reader.text(_MOST_NAME)
            if name in self.metadata:
                raise GGUFError(f"{path} has the metadata {name!r} twice")
            self.metadata[name] = reader.value()
        places = [self._place(reader) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise GGUFError(f"{path}: general.alignment must be a small multiple of 8, got {alignment!r}")
        self.header = self._map[: reader.at]
        start = -(-reader.at // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in places:
            if name in self.tensors:
                raise GGUFError(f"{path} has the tensor {name!r} twice")
            self.tensors[name] = self._checked(name, shape, kind, start + offset, alignment)

    def _place(self, reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
        name = reader.text(_MOST_NAME)
        dimensions = reader.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise GGUFError(
                f"{self.path}: the tensor {name!r} has {dimensions} dimensions; wanted 1 to {_MOST_DIMENSIONS}"
            )
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, reader.number("I"), reader.number("Q")

    def _checked(self, name: str, shape: tuple[int, ...], kind: int, offset: int, alignment: int) -> TensorInfo:
        if kind not in TYPES:
            known = ", ".join(name for name, _, _ in TYPES.values())
            raise GGUFError(f"{self.path}: the tensor {name!r} is of type {kind}; these can be read: {known}")
        label, block, size = TYPES[kind]
        elements = math.prod(shape)
        if not elements or shape[-1] % block:
            raise GGUFError(f"{self.path}: the tensor {name!r} of type {label} has shape {list(shape)}")
        nbytes = elements // block * size
        if offset % alignment or offset + nbytes > len(self._map):
            raise GGUFError(
                f"{self.path} is cut off or damaged: the tensor {name!r} should take {nbytes} bytes from {offset} on, "
                f"the file has {len(self._map)}"
            )
        return TensorInfo(shape, label, offset, nbytes)

    def data(self, name: str) -> Any:
        """Bytes of a tensor, read-only uint8 [rows, bytes of a row]; nothing is copied."""
        info = self.tensors[name]
        flat = np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)
        return flat.reshape(math.prod(info.shape[:-1]), -1)


class _Reader:
    """Reads values one after the other, and never beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise GGUFError(f"{self.path} is cut off or damaged: {count} bytes were to follow byte {self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.bytes(struct.calcsize("<" + kind)))[0]

    def text(self, most: int | None = None) -> str:
        length = self.number("Q")
        if most is not None and length > most:
            raise GGUFError(f"{self.path} is damaged: a name of {length} bytes")
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(f"{self.path} is damaged: a text before byte {self.at} is not UTF-8") from error

    def value(self) -> Any:
        kind = self.number("I")
        if kind != _ARRAY:
            return self._one(kind)()
        of, count = self.number("I"), self.number("Q")
        if of == _ARRAY:
            raise GGUFError(f"{self.path} has an array of arrays in its metadata, which no model needs")
        read = self._one(of)
        if of == _STRING:
            if count * 8 > len(self.data) - self.at:  # each text takes its length at least
                raise GGUFError(f"{self.path} is cut off or damaged: an array of {count} texts at byte {self.at}")
            return [read() for _ in range(count)]
        dtype = np.dtype(_SCALARS[of]).newbyteorder("<")
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()

    def _one(self, kind: int) -> Callable[[], Any]:
        if kind == _STRING:
            return self.text
        if kind not in _SCALARS:
            raise GGUFError(f"{self.path} is damaged: metadata of the unknown type {kind} before byte {self.at}")
        return lambda: self.number(_SCALARS[kind])
