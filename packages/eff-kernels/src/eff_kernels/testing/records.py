"""Benchmark recorder: providers timed in turn in one process, checked for correctness there, appended as JSON lines.

    recorder = Recorder("rms_norm", Path("bench/results/rms_norm.jsonl"))
    providers = [Provider("eager", eager), Provider("eff", ours, backend="cpu", check=...)]
    recorder.run("64x576 fp32", providers, mode="forward, cache", bytes=294912)
    print(recorder.table())

Times of shared machines wander, so that only ratios within one run mean something: the providers take turns, each
sample is short, and the record holds the 20th, 50th and 80th percentile.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from eff_kernels.testing.machine import (
    cpu_flags,
    device_name,
    last_level_cache_bytes,
    matmul_rate,
    read_bandwidth,
)
from eff_kernels.testing.tables import ratio_table

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Provider:
    """One implementation in a comparison.

    Attributes:
        name: Such as "eager", "torch.compile", "transformers" or "eff".
        run: Computes; called with the number of the call, so that it can take the next of several sets of inputs.
        backend: The backend behind the name, where there are several.
        check: Tells whether the result is right. Without one the provider is timed, but its record is not ``ok`` and
            enters no table; what others are compared with needs a check as they do.
    """

    name: str
    run: Callable[[int], Any]
    backend: str = ""
    check: Callable[[], bool] | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """Percentiles of the time of one call in seconds, over ``n`` samples."""

    p20: float
    p50: float
    p80: float
    n: int


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a results file.

    ``achieved`` is in GB/s where bytes are given, else in GFLOP/s. ``roofline`` is the time that this machine needs at
    least, by its measured bandwidth and matrix rate, divided by the median time. ``checked`` tells whether the result
    was compared with another one in the same process, ``ok`` that it was and agreed.
    """

    op: str
    spec: str
    provider: str
    backend: str
    mode: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    n: int
    bytes: int | None
    flops: int | None
    achieved: float | None
    roofline: float | None
    device: str
    torch: str
    triton: str | None
    driver: str | None
    eff: str
    commit: str | None
    dirty: bool | None
    date: str
    checked: bool
    ok: bool
    threads: int
    cpu_flags: str

    @property
    def publishable(self) -> bool:
        """Whether the record may stand in a table: found right by a check, and made from code that a commit holds."""
        return self.checked and self.ok and self.commit is not None and self.dirty is False


def measure(
    providers: Sequence[Provider], *, rounds: int = 40, sample_seconds: float = 1e-3, device: str = "cpu"
) -> dict[str, Times]:
    """Time providers in turn.

    Each round takes one sample of every provider, starting with another one each time. A sample is one call that is not
    timed, which brings code and inputs into the caches, and then as many calls as fit into ``sample_seconds``.
    """
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    counts, calls = {}, dict.fromkeys((p.name for p in providers), 0)
    if len(calls) != len(providers):
        raise ValueError(f"provider names must differ, got {[p.name for p in providers]}")

    def sample(provider: Provider, count: int) -> float:
        at, run = calls[provider.name], provider.run
        run(at)
        synchronise()
        start = time.perf_counter()
        for i in range(at + 1, at + 1 + count):
            run(i)
        synchronise()
        calls[provider.name] = at + 1 + count
        return (time.perf_counter() - start) / count

    for provider in providers:
        took = sample(provider, 1)  # compiling and allocating happen here
        if took < 100 * sample_seconds:  # else even an estimate that is far off gives one call a sample
            took = sample(provider, 3)
        counts[provider.name] = max(1, int(sample_seconds / took))
    samples: dict[str, list[float]] = {p.name: [] for p in providers}
    for turn in range(rounds):
        for k in range(len(providers)):
            provider = providers[(turn + k) % len(providers)]
            samples[provider.name].append(sample(provider, counts[provider.name]))
    return {name: _percentiles(values) for name, values in samples.items()}


def rotating(make: Callable[[], T], nbytes: int, *, times: float = 4.0) -> list[T]:
    """As many sets of inputs as are needed so that none is still in a cache when its turn comes again.

    Args:
        make: Makes one set.
        nbytes: Size of that part of a set which a call reads.
        times: How often the sets together must fill the last cache.

    Returns:
        At least two sets; a provider takes ``sets[i % len(sets)]``.
    """
    return [make() for _ in range(max(2, int(times * last_level_cache_bytes() / max(nbytes, 1)) + 1))]


class Recorder:
    """Runs comparisons of one op and appends a record for each provider to a file.

    Args:
        op: Name of the op.
        path: Results file (JSON lines), made if absent; None only keeps the records.
        device: "cpu" or "cuda".
        sources: Files and folders of the code that is measured; a record is dirty if one of them differs from the
            commit. Default: all of eff_kernels.
    """

    def __init__(self, op: str, path: Path | None, *, device: str = "cpu", sources: Sequence[Path] = ()) -> None:
        self.op, self.path, self.device = op, path, device
        self.sources = tuple(sources) or (Path(__file__).parents[1],)
        self.records: list[Record] = []

    def run(
        self,
        spec: str,
        providers: Sequence[Provider],
        *,
        mode: str,
        bytes: int | None = None,
        flops: int | None = None,
        working_set: int | None = None,
        rounds: int = 40,
    ) -> dict[str, Times]:
        """Check and time the providers, append their records.

        Args:
            spec: Names the shape and dtype.
            providers: In the order in which the table shows them.
            mode: What was measured, such as "forward, cache", "forward, memory", "backward".
            bytes: Least traffic of one call, for the roofline.
            flops: Arithmetic of one call, for the roofline.
            working_set: All that is touched before an input comes round again, in bytes; decides between the bandwidth
                of the cache and that of memory. Default: ``bytes``.
            rounds: Number of samples of each provider.
        """
        good = {p.name: p.check is not None and bool(p.check()) for p in providers}
        times = measure(providers, rounds=rounds, device=self.device)
        floor = self._floor(bytes, flops, working_set)
        common = environment(self.device, self.sources)
        for p in providers:
            t = times[p.name]
            rate = None if bytes is None and flops is None else (bytes or flops or 0) / t.p50 / 1e9
            record = Record(
                op=self.op,
                spec=spec,
                provider=p.name,
                backend=p.backend,
                mode=mode,
                metric="time",
                unit="us",
                p20=round(t.p20 * 1e6, 3),
                p50=round(t.p50 * 1e6, 3),
                p80=round(t.p80 * 1e6, 3),
                n=t.n,
                bytes=bytes,
                flops=flops,
                achieved=None if rate is None else round(rate, 3),
                roofline=None if floor is None else round(floor / t.p50, 4),
                checked=p.check is not None,
                ok=good[p.name],
                **common,
            )
            self.add(record)
        return times

    def add(self, record: Record) -> None:
        """Keep a record and append it to the file."""
        self.records.append(record)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")

    def table(self, baseline: str | None = None) -> str:
        """Median times and speed relative to ``baseline`` (default: the first provider) as a Markdown table."""
        return ratio_table(self.records, baseline)

    def _floor(self, nbytes: int | None, flops: int | None, working_set: int | None) -> float | None:
        if self.device != "cpu" or (nbytes is None and flops is None):
            return None
        threads = torch.get_num_threads()
        memory = 0.0
        if nbytes:
            limit = 4 * last_level_cache_bytes()
            memory = nbytes / read_bandwidth(min(working_set or nbytes, limit), threads)
        return max(memory, (flops or 0) / matmul_rate(threads))


def load_records(path: Path) -> list[Record]:
    """Read a results file; a record that does not say that it was checked was not."""
    lines = path.read_text().splitlines()
    return [Record(**{"checked": False, **json.loads(line)}) for line in lines if line.strip()]


def same(actual: Any, wanted: Any, *, tolerance: float) -> bool:
    """Whether two results agree to a relative error (Frobenius norm); a check for a `Provider`."""
    pairs = [(actual, wanted)] if isinstance(actual, Tensor) else list(zip(actual, wanted, strict=True))
    return all(
        a.shape == w.shape and float((a.double() - w.double()).norm()) <= tolerance * float(w.double().norm())
        for a, w in pairs
    )


def _percentiles(values: Sequence[float]) -> Times:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Times(fifths[0], statistics.median(values), fifths[-1], len(values))


def environment(device: str, sources: tuple[Path, ...]) -> dict[str, Any]:
    """The fields of a record that tell of the machine, the versions and the state of ``sources``."""
    commit, dirty = _git_state(sources)
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _driver() if torch.device(device).type == "cuda" else None,
        "eff": _version("eff-kernels") or "unknown",
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "cpu_flags": cpu_flags(),
    }


@functools.cache
def _git_state(sources: tuple[Path, ...]) -> tuple[str | None, bool | None]:
    """Commit of the repository around the sources, and whether one differs from it; None outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(sources[0].parent), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--", *map(str, sources)))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return torch.version.hip


def _nothing() -> None:
    """There is nothing to wait for on the CPU."""
