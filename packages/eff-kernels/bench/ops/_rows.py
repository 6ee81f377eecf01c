"""What the benchmarks of the row-wise ops share: options, providers, the loop over specs, dtypes and memory modes."""

import argparse
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import eff_kernels
import torch
from eff_kernels.op import Op
from eff_kernels.testing import Provider, Recorder, rotating, same, to_float64
from eff_kernels.testing.machine import last_level_cache_bytes
from eff_kernels.testing.specs import Spec

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """An op to measure: ``peers`` maps the names of other implementations to functions with the same arguments."""

    op: Op
    ours: Callable
    reference: Callable
    eager: Callable
    peers: dict[str, Callable]
    specs: Sequence[Spec]
    sources: Sequence[str]
    gradients: Sequence[int] = ()


def keep_freed_memory() -> None:
    """Have the C library keep freed memory; page faults of fresh memory, taken at random, would outweigh the ops."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at most this
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def main(*cases: Case) -> None:
    parser = argparse.ArgumentParser(description="Times one op against eager PyTorch, torch.compile and its peers.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--specs", default="", help="only specs whose name contains this text")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for case in cases:
        path = None if options.dry else RESULTS / f"{case.op.name}.jsonl"
        sources = [PACKAGE / s for s in (*case.sources, "op.py", "native/call.py", "native/src/rows.h")]
        recorder = Recorder(case.op.name, path, sources=sources)
        for spec in case.specs:
            if options.specs in spec.name:
                for name, dtype in DTYPES.items():
                    measure(case, recorder, spec, name, dtype, options)
        print(f"\n{case.op.name}\n{recorder.table()}")


def measure(case: Case, recorder: Recorder, spec: Spec, dtype_name: str, dtype: torch.dtype, options) -> None:
    args = spec.args(dtype)
    nbytes = spec.bytes(*args)
    functions = {"eager": case.eager, **case.peers}
    if not options.no_compile:
        torch._dynamo.reset()
        functions["torch.compile"] = torch.compile(case.eager, dynamic=False)
    functions["eff"] = case.ours
    label = f"{spec.name} {dtype_name}"
    with torch.inference_mode():
        wanted = case.reference(*to_float64(args))
        modes = {"forward, cache": [args]}
        if nbytes * 16 > last_level_cache_bytes():
            modes["forward, memory"] = rotating(lambda: spec.args(dtype), nbytes)
        for mode, sets in modes.items():
            providers = [provider(case, n, f, sets, wanted, TOLERANCE[dtype]) for n, f in functions.items()]
            recorder.run(
                label, providers, mode=mode, bytes=nbytes, working_set=nbytes * len(sets), rounds=options.rounds
            )
    if case.gradients and args[0].numel() > 50_000:
        backward(case, recorder, label, args, functions, options)


def provider(case: Case, name: str, function: Callable, sets: list, wanted, tolerance: float) -> Provider:
    with torch.inference_mode():
        result = function(*sets[0])  # compiling happens here
    good = same(result, wanted, tolerance=tolerance)
    backend = case.op.select_backend(*schema(case, sets[0])).name if name == "eff" else ""
    return Provider(name, lambda i: function(*sets[i % len(sets)]), backend=backend, check=lambda: good)


def schema(case: Case, args: tuple) -> tuple:
    extra = {"rms_norm": (1e-6,), "add_rms_norm": (1e-6,), "rope": (False, False), "swiglu": ()}
    return (*args, *extra[case.op.name])


def backward(case: Case, recorder: Recorder, label: str, args: tuple, functions: dict, options) -> None:
    """Forward and backward together, with all gradients that the op gives."""
    leaves = [a.detach().clone().requires_grad_(i in case.gradients) for i, a in enumerate(args)]
    wanted_leaves = [leaves[i] for i in case.gradients]
    wide = to_float64(tuple(args))
    wide_leaves = [a.requires_grad_(i in case.gradients) for i, a in enumerate(wide)]
    truth = gradients(case.reference(*wide_leaves), [wide_leaves[i] for i in case.gradients])
    providers = []
    for name, function in functions.items():

        def run(i: int, function: Callable = function) -> list:
            return gradients(function(*leaves), wanted_leaves)

        good = same(run(0), truth, tolerance=10 * TOLERANCE[leaves[0].dtype])
        providers.append(Provider(name, run, check=lambda good=good: good))
    recorder.run(label, providers, mode="forward + backward, cache", rounds=options.rounds)


def gradients(output, leaves: list) -> list:
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
