"""What a benchmark record says about the machine, and the two limits of a kernel, measured and not looked up."""

from __future__ import annotations

import functools
import platform
import re
import time
from pathlib import Path

import torch

_ISA = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "sve",
    "i8mm",
    "bf16",
)


def cpu_flags() -> str:
    """Those instruction sets of this processor that decide which kernels run, such as "avx2 avx512_vnni"."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return " ".join(f for f in _ISA if f in flags) or platform.machine()


def device_name(device: torch.device | str = "cpu") -> str:
    """The device as a record names it: the GPU's name, or the processor with its instruction sets."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    numbers = [re.search(rf"^{key}\s*:\s*(\d+)$", _cpuinfo(), re.MULTILINE) for key in ("cpu family", "model")]
    family = f" family {numbers[0][1]} model {numbers[1][1]}" if numbers[0] and numbers[1] else ""
    return f"{name}{family} ({cpu_flags()})"


def last_level_cache_bytes() -> int:
    """Size of the largest cache of processor 0; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 * 2**20)


@functools.cache
def read_bandwidth(working_set: int, threads: int) -> float:
    """Bytes a second at which PyTorch's dot product reads a working set, the best of several runs.

    Args:
        working_set: In bytes; above the last cache it gives the bandwidth of memory, below that of the cache.
        threads: Only part of the key: the caller has set it.
    """
    size = max(working_set, 2**14) // 8
    a, b = torch.ones(size), torch.ones(size)
    repeats = max(1, 2**22 // size)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(repeats):
            torch.dot(a, b)
        best = min(best, (time.perf_counter() - start) / repeats)
    return 8 * size / best


@functools.cache
def matmul_rate(threads: int) -> float:
    """Multiply-adds x 2 a second of a 768 x 768 float32 matrix product, the best of several runs."""
    a = torch.randn(768, 768)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best


@functools.cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return ""
