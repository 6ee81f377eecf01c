"""Giving pages of a safetensors checkpoint back to the system while it is loaded."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Looking through the process' mappings takes some milliseconds, so it is done so often for a checkpoint, and no more
# often than for every so many bytes of weights.
TIMES, LEAST = 64, 2**22


class CheckpointMemory:
    """Gives memory back to the system while the files of a checkpoint are read and quantised.

    Two things pile up meanwhile. transformers maps the files, and pages that were read stay part of the process until
    the file is closed, whether the weight was used as it is or cast to another dtype; and the allocator keeps freed
    temporaries between the new weights. Pages are released only of mappings that are younger than this object and that
    nobody has written to. Tensors in them stay valid: touching one reads the file again. Does something on Linux only.

    Args:
        files: Files that are about to be loaded.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._files = {str(Path(f).resolve()) for f in files}
        size = sum(path.stat().st_size for path in map(Path, self._files) if path.exists())
        self._every = max(LEAST, size // TIMES)
        self._old = {m.span for m in _mappings(self._files)}
        self._taken = 0

    def took(self, nbytes: int) -> None:
        """Count a weight that has been quantised; now and then release."""
        self._taken += nbytes
        if self._taken >= self._every:
            self._taken = 0
            self.release()

    def release(self) -> int:
        """Release now and return how many bytes of mapped files were let go."""
        if sys.platform != "linux":
            return 0
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
        released = 0
        for mapping in _mappings(self._files):
            start, end = mapping.span
            if mapping.span in self._old or mapping.written or not mapping.resident:
                continue
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED) == 0:
                released += mapping.resident
        return released


class _Mapping(NamedTuple):
    """A file's mapping: addresses, bytes in memory, and bytes of pages that are private copies as they were written."""

    span: tuple[int, int]
    resident: int
    written: int


def _mappings(files: set[str]) -> list[_Mapping]:
    """The mappings of these files in this process, according to the kernel."""
    if sys.platform != "linux" or not files:
        return []
    found = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):  # a mapping's first line: low-high permissions offset device inode path
            path = rest.split(maxsplit=4)[4:]
            inside = path != [] and path[0] in files
            if inside:
                low, _, high = word.partition("-")
                found.append(_Mapping((int(low, 16), int(high, 16)), 0, 0))
        elif inside and word in ("Rss:", "Anonymous:"):
            size = 1024 * int(rest.split()[0])
            found[-1] = found[-1]._replace(resident=size) if word == "Rss:" else found[-1]._replace(written=size)
    return found
