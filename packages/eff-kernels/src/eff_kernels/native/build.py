"""Compile the C sources once per machine and load them.

All of ``native/src/*.c`` becomes one shared library in the user's cache (``EFF_CACHE_DIR``, else the XDG cache), keyed
by sources, compiler and processor, so that a shared home directory serves different machines. It takes a few seconds,
once. The compiler is ``EFF_KERNELS_CC`` if set, else ``cc``, ``gcc`` or ``clang`` on the PATH, else the one inside the
PyPI package ziglang. Without any of these the ops fall back to PyTorch, and their ``explain`` says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP runtime whose thread pool the kernels share

_SOURCES = Path(__file__).parent / "src"
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wall")


class NativeBuildError(RuntimeError):
    """The compiled kernels cannot be had on this machine; the message says why."""


@functools.cache
def library(*defines: str) -> ctypes.CDLL:
    """Return the compiled kernels, building them if the cache has none.

    Args:
        defines: Extra ``-D`` macros, for tests of code paths that belong to other processors.

    Raises:
        NativeBuildError: no compiler was found, compiling failed, or the result failed its self test.
    """
    command = _compiler()
    flags = (*_FLAGS, *(f"-D{d}" for d in defines))
    path = _cache_dir() / f"kernels-{_fingerprint(command, flags)}.so"
    if not _whole(path):
        _compile(command, flags, path)
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(
            f"the compiled kernels at {path} do not load: {error}; remove the file to rebuild it"
        ) from error
    _share_openmp(lib)
    lib.eff_self_test.restype = ctypes.c_int
    failed = lib.eff_self_test()
    if failed:
        raise NativeBuildError(f"the compiled kernels at {path} failed their self test (check {failed})")
    return lib


@functools.cache
def unavailable() -> str | None:
    """The reason why the compiled kernels cannot be had, or None when they can."""
    try:
        library()
    except NativeBuildError as error:
        return str(error)
    return None


def _compiler() -> list[str]:
    chosen = os.environ.get("EFF_KERNELS_CC")
    if chosen == "none":
        raise NativeBuildError("compiled kernels are switched off (EFF_KERNELS_CC=none)")
    if chosen:
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise NativeBuildError("no C compiler found; install one, or pip install 'eff-kernels[native]', which brings one")


def _cache_dir() -> Path:
    root = os.environ.get("EFF_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eff"
    return Path(root) / "kernels"


def _fingerprint(command: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update("\0".join((*command, *flags, platform.machine(), _processor())).encode())
    compiler = shutil.which(command[0])
    if compiler:
        status = Path(compiler).resolve().stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Name and instruction sets: what ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def _compile(command: list[str], flags: tuple[str, ...], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = Path(scratch) / path.name
            sources = [str(s) for s in sorted(_SOURCES.glob("*.c"))]
            run = subprocess.run(
                [*command, *flags, *sources, "-o", str(built), "-lm"], capture_output=True, text=True, timeout=300
            )
            if run.returncode:
                raise NativeBuildError(f"{shlex.join(command)} failed to compile the kernels:\n{run.stderr[-2000:]}")
            stamp = Path(scratch) / "stamp"
            stamp.write_text(_digest(built))
            built.replace(path)  # atomic: processes that build at the same time do not see half a file
            stamp.replace(_stamp(path))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"compiling the kernels into {path.parent} failed: {error}") from error


def _stamp(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(path: Path) -> bool:
    """Whether the library is there as it was built; calling into a cut one would end the process (bus error)."""
    try:
        return _stamp(path).read_text() == _digest(path)
    except OSError:
        return False


def _share_openmp(lib: ctypes.CDLL) -> None:
    """Hand the kernels PyTorch's own thread pool; a second one would compete with it for the cores."""
    lib.eff_use_openmp.argtypes = [ctypes.c_void_p]
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return  # an OpenMP runtime other than GNU's: the kernels stay on one thread
    lib.eff_use_openmp(ctypes.cast(parallel, ctypes.c_void_p))
