"""Metrics: means over a few updates, a file of JSON lines that survives crashes, TensorBoard by option."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Means:
    """Weighted means of scalars, summed on their device so that no update waits for them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Add one observation of each value."""
        for name, value in values.items():
            # A Python float would become a float32 tensor first.
            exact = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            term = exact * weight
            self.sums[name] = self.sums[name] + term if name in self.sums else term
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def read(self) -> dict[str, float]:
        """The means so far."""
        return {name: float(total) / self.weights[name] for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: sums and weights by name."""
        return {"sums": {n: t.cpu() for n, t in self.sums.items()}, "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        self.sums = {n: t.to(device) for n, t in state["sums"].items()}
        self.weights = dict(state["weights"])


class MetricsFile:
    """JSON lines, one record each, on the disk after each `write`.

    A disk that is full does not end the training: records wait in memory, and are written when there is room.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.waiting: list[str] = []
        _cut_last_line(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. Values that JSON has no number for (nan, inf) become text."""
        self.waiting.append(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                data = "".join(self.waiting).encode()
                if file.write(data) != len(data):
                    raise OSError(f"{self.path.name} was written only in part: the last line is cut")
        except OSError as error:
            if len(self.waiting) == 1:
                self.say(f"metrics wait in memory, {self.path} cannot be written: {error}")
            with suppress(OSError):
                os.truncate(self.path, size)
        else:
            self.waiting = []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file, as an unbroken run would have written them.

    Where a run was resumed from an earlier update, the records after that update that were computed twice appear once.
    A line that was cut off by a crash is left out.
    """
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("event") == "resume":
            records = [r for r in records if r["step"] <= record["step"] or r.get("event") in ("resume", "stop")]
        records.append(record)
    return records


class Board:
    """Scalars for TensorBoard (extra ``tensorboard``), by category: ``train/loss``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, category: str, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self.writer.add_scalar(f"{category}/{name}", value, step)
        self.writer.flush()

    def close(self) -> None:
        """Finish the files."""
        self.writer.close()


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cut_last_line(path: Path) -> None:
    """Remove what a crash has left of an unfinished last line."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
