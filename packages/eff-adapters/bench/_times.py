"""Processor time of calls that take turns: other programs on the machine disturb it less than the clock."""

import time

import torch
from eff_kernels.testing import Record, Recorder
from eff_kernels.testing.records import environment


def take_times(
    recorder: Recorder,
    spec: str,
    mode: str,
    calls: dict,
    rounds: int,
    right: dict[str, bool],
    prepare=lambda name: None,
) -> None:
    """Record the time of one thread in each call, in turn; the first calls are not counted.

    Args:
        recorder: Gets a record of each call.
        spec: Names the inputs.
        mode: What was measured.
        calls: By name.
        rounds: How often each is called.
        right: Of the calls that were compared with another, whether they agreed.
        prepare: Called with a name before each call, outside of its time.
    """
    names, samples = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 1):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            prepare(name)
            start = time.thread_time()
            calls[name]()
            if turn:
                samples[name].append((time.thread_time() - start) * 1e6)
    common = environment(recorder.device, recorder.sources)
    for name, values in samples.items():
        sample = torch.tensor(values, dtype=torch.float64)
        p20, p50, p80 = (round(float(sample.quantile(q)), 1) for q in (0.2, 0.5, 0.8))
        print(f"{spec} {mode} {name}: {p50 / 1e3:.1f} ms ({p20 / 1e3:.1f} to {p80 / 1e3:.1f})", flush=True)
        recorder.add(
            Record(
                op=recorder.op, spec=spec, provider=name, backend="", mode=mode, metric="processor time", unit="us",
                p20=p20, p50=p50, p80=p80, n=rounds, bytes=None, flops=None, achieved=None, roofline=None,
                checked=name in right, ok=right.get(name, False), **common,
            )
        )  # fmt: skip
