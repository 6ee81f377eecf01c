"""Looking into a safetensors checkpoint before it is loaded, and giving pages of the file back while it is."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from eff_quant.llm_int8.layer import check_int8_entry


def check_int8_files(files: Iterable[str | Path]) -> set[str]:
    """Check the int8 layers in safetensors files and return the names of those without a ``weight_format`` entry.

    Only headers and the one-byte formats are read.

    Raises:
        KeyError: an int8 weight has no ``SCB``; the message names the module.
        ValueError: an unsupported ``weight_format``.
    """
    from safetensors import safe_open

    dtypes: dict[str, str] = {}
    formats: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 - a safetensors handle is no dict
                dtypes[key] = f.get_slice(key).get_dtype()
                if key.endswith(".weight_format"):
                    formats[key] = f.get_tensor(key)
    without = set()
    for key, dtype in dtypes.items():
        if key.endswith(".weight") and dtype == "I8":
            prefix = key.removesuffix("weight")
            check_int8_entry(
                prefix, has_scales=prefix + "SCB" in dtypes, weight_format=formats.get(prefix + "weight_format")
            )
            if prefix + "weight_format" not in formats:
                without.add(prefix.removesuffix("."))
    return without


def release_memory(tensor: Tensor) -> bool:
    """Give back to the system what reading and quantising this tensor took, as far as it is not needed any more.

    Two things pile up while a large checkpoint is quantised. transformers maps the files, and pages that were read stay
    part of the process until the file is closed; and the allocator keeps freed temporaries between the new weights. The
    pages are released only if the tensor is a view of a mapped safetensors file. It stays valid: touching it reads the
    file again.

    Returns:
        Whether pages of a file were released: False for any other tensor, and on systems other than Linux.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return False
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last or not _maps_safetensors(start, end):
        return False
    return libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED) == 0


def _maps_safetensors(start: int, end: int) -> bool:
    """Whether these addresses lie in one mapping of a safetensors file, according to the kernel."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, rest = line.partition(" ")
        low, _, high = span.partition("-")
        if int(low, 16) <= start and end <= int(high, 16):
            return rest.rstrip().endswith(".safetensors")
    return False
