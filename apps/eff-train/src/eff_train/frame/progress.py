"""Where a run is: a bar with rate and remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 20.0


class Display:
    """Shows the progress of ``steps`` updates with ``batch_size`` samples each on standard error."""

    def __init__(self, title: str, steps: int, batch_size: int, *, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self.steps, self.batch_size, self.first, self.start = steps, batch_size, 0, time.monotonic()
        self._line_at = self.start
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=steps, rate="", metrics="")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def begin(self, step: int) -> None:
        """The updates start now, after ``step`` that were done before."""
        self.first, self.start = step, time.monotonic()
        self.bar.reset(self.task, completed=step)

    def seconds_left(self, step: int) -> float:
        """Time for the updates after ``step``, by the rate since `begin`."""
        return (self.steps - step) * (time.monotonic() - self.start) / max(1, step - self.first)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """``step`` updates are done."""
        self.bar.update(self.task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> float:
        """Show metrics of the last updates; returns the rate since the start in samples per second."""
        now = time.monotonic()
        rate = (step - self.first) * self.batch_size / max(now - self.start, 1e-9)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.update(self.task, rate=f"{rate:.3g} samples/s", metrics=text)
        if not self.console.is_terminal and (now - self._line_at > SECONDS_BETWEEN_LINES or step == self.steps):
            left = clock(self.seconds_left(step))
            self.say(f"update {step}/{self.steps}  {rate:.3g} samples/s  {left} left  {text}")
            self._line_at = now
        return rate


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
