"""Finished runs of a sweep in a file, and what the sweep tells while it runs."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff_quant.sensitivity.measure import Layer, measure_layers
from eff_quant.sensitivity.passes import Runner
from eff_quant.sensitivity.report import Direction, Mode, Pass
from eff_quant.sensitivity.score import Score

Progress = Callable[[int, int, str], object]

# Raised when a result would come out otherwise for the same model, tokens and formats.
RESULT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One run that a sweep has to make."""

    mode: Mode
    direction: Direction
    format: str
    block: int | None
    component: str | None
    formats: Mapping[str, str]


class Records:
    """Finished runs in a file of JSON lines, by a hash of all that a result depends on."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self._path = None if path is None else Path(path)
        self._fingerprint = fingerprint
        self._known: dict[str, dict[str, Any]] = {}
        if self._path is not None and self._path.exists():
            text = self._path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # the last run ended while it wrote
                self._path.write_text(whole)
            self._known = {line["key"]: line for line in map(json.loads, whole.splitlines())}

    def run(self, runner: Runner, step: Step, show: Shown) -> Pass:
        """Make a run, or read it."""
        key = self._key("pass", sorted(step.formats.items()))
        where = step.component or step.mode if step.block is None else f"block {step.block} {step.component or ''}"
        show(f"{step.format} {step.direction} {where}")
        if key not in self._known:
            if (step.mode, step.direction) == ("block", "restore"):  # the full run may have been read, not made
                runner.hold({p.name: step.format for p in runner.parts.linears})
            start = time.perf_counter()
            found = runner.run(step.formats, keep=step.mode == "full")
            what = {k: getattr(step, k) for k in ("format", "mode", "direction", "block", "component")}
            self._add(key, {**what, "seconds": round(time.perf_counter() - start, 2), **_rounded(found)})
        line = self._known[key]
        return Pass(
            step.mode, step.direction, step.format, step.block, step.component, tuple(line["nll"]), tuple(line["kl"])
        )

    def layers(self, runner: Runner, formats: Sequence[str], show: Shown) -> list[Layer]:
        """Look at the layers, or read what was seen, maybe for more formats."""
        key = self._key("layers", [p.name for p in runner.parts.linears])
        show("layers")
        if not set(formats) <= set(self._known.get(key, {}).get("formats", ())):
            seen = measure_layers(runner, formats, show.again)
            self._add(key, {"formats": list(formats), "layers": [asdict(la) for la in seen]})
        by_format = ("weight_sqnr", "output_sqnr", "block_error")
        return [
            Layer(**values | {name: {f: values[name][f] for f in formats} for name in by_format})
            for values in self._known[key]["layers"]
        ]

    def _key(self, kind: str, what: object) -> str:
        return hashlib.sha256(json.dumps([self._fingerprint, kind, what]).encode()).hexdigest()[:16]

    def _add(self, key: str, values: dict[str, Any]) -> None:
        line = json.dumps({"key": key, **values})
        self._known[key] = json.loads(line)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(line + "\n")


def _rounded(found: Score) -> dict[str, list[float]]:
    """Sums to nine digits: float32 logits have no more."""
    return {name: [float(f"{v:.9g}") for v in sums] for name, sums in asdict(found).items()}


class Shown:
    """Where the sweep is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress or _terminal()
        self._done, self._total, self._text = -1, total, ""

    def __call__(self, text: str) -> None:
        """Tell of the next step."""
        self._done, self._text = self._done + 1, text
        self.again()

    def again(self) -> None:
        """Tell of the same step again."""
        self._progress(self._done, self._total, self._text)


def _terminal() -> Progress:
    if not sys.stderr.isatty():
        return lambda done, total, text: None

    def show(done: int, total: int, text: str) -> None:
        sys.stderr.write(f"\r\x1b[Ksensitivity_sweep: {done}/{total} {text}")
        sys.stderr.flush()

    return show


def fingerprint(model: nn.Module, windows: Sequence[Tensor], weights: bool, activations: bool) -> str:
    """What every result depends on: weights, tokens, what is rounded, and the code that does it."""
    digest = hashlib.sha256()
    versions = [RESULT_VERSION, torch.__version__, version("eff-kernels"), weights, activations]
    digest.update(json.dumps([*versions, repr(getattr(model, "config", type(model).__name__))]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for w in windows:
        digest.update(json.dumps(w.tolist()).encode())
    return digest.hexdigest()
