"""SIGTERM and Ctrl-C as a wish that the loop reads, so that it can save before it ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Stop:
    """Context in which the first SIGTERM or SIGINT sets ``signal``; a second one acts as it does without this."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        # Python lets the main thread alone set handlers; elsewhere (a notebook's worker) signals are not ours.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
