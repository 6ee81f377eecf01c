"""Work on a thread that ends, and the memory that it leaves."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def on_a_thread_that_ends(work: Callable[[], T]) -> T:
    """Do ``work`` on a thread of its own, and wait for it.

    OpenMP keeps a pool of threads for each thread that has computed, for as long as that one lives. A model that is
    loaded on the main thread and runs on the engine's would leave two pools, more threads than processors, which wait
    by spinning: a step of a small model then takes a quarter longer.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again below
            errors.append(error)

    # A daemon, so that Ctrl-C does not have to wait for it.
    thread = threading.Thread(target=run, name="eff-load", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def give_memory_back() -> None:
    """Return to the system what loading has freed; glibc keeps it otherwise, and a server allocates little more."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
