"""Benchmark of neighborhood_attention: ``python packages/eff-kernels/bench/ops/neighborhood_attention.py --threads 1``.

Peers on the CPU: natten's FlexAttention path (forward only, as it has no backward there), SDPA with the window as a
dense mask, and compiled FlexAttention with the window as a block mask. Only SDPA and ours can train.
"""

import argparse
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import eff_kernels
import torch
import torch.nn.functional as F
from eff_kernels import neighborhood_attention
from eff_kernels.ops.neighborhood_attention import neighborhood_mask
from eff_kernels.ops.neighborhood_attention.specs import BENCH_SPECS
from eff_kernels.testing import Provider, Recorder, same

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/neighborhood_attention", "op.py", "native/call.py", *(
    f"native/src/neighborhood{x}" for x in (".h", ".c", "_tile.c", "_backward.c")
))  # fmt: skip


def window_mask(q, window, causal):
    rank = q.dim() - 3
    window = [window] * rank if isinstance(window, int) else list(window)
    return neighborhood_mask(q.shape[1:-2], window, [1] * rank, [1] * rank, [causal] * rank)


def sdpa(q, k, v, mask):
    a, b, c = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(a, b, c, attn_mask=mask).transpose(1, 2).unflatten(1, q.shape[1:-2])


def flex(mask, n):
    """Compiled FlexAttention; the window is read from the dense mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, n, n, device="cpu")
    run = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v):
        a, b, c = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
        return run(a, b, c, block_mask=block).transpose(1, 2).unflatten(1, q.shape[1:-2])

    return attend


def natten_flex(rank, window, causal):
    import natten

    function = (natten.na1d, natten.na2d, natten.na3d)[rank - 1]
    return lambda q, k, v: function(q, k, v, window, is_causal=causal, backend="flex-fna")


def gradients(run, leaves, grad):
    return torch.autograd.grad(run(*leaves), leaves, grad)


def provider(name, run, truth, tolerance):
    check = None if truth is None else lambda: same(run(), truth, tolerance=tolerance)
    return Provider(name, lambda i: run(), backend="cpu" if name == "eff" else "", check=check)


def memory_of(call: str, backward: bool) -> int:
    """Peak resident memory in bytes of a call on q, k, v and the mask, in a process of its own."""
    code = (
        "import resource, torch, eff_kernels as e; import torch.nn.functional as F; torch.set_num_threads(1); "
        f"out = {call}; {'out.sum().backward(); ' if backward else ''}"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) * 1024


def memory() -> None:
    """Print what maps of growing size take at most, above a map of 8 x 8."""
    ours = (
        "e.neighborhood_attention(*(torch.randn(1, {n}, {n}, 8, 32, requires_grad=True) for _ in range(3)), 7).output"
    )
    sdpa = (
        "F.scaled_dot_product_attention(*(torch.randn(1, 8, {n} * {n}, 32, requires_grad=True) for _ in range(3)), "
        "attn_mask=e.ops.neighborhood_attention.neighborhood_mask(({n}, {n}), [7, 7], [1, 1], [1, 1], [False, False]))"
    )
    print(
        "| map | eff, forward | eff, both | SDPA with a mask, forward | SDPA with a mask, both |\n" + 5 * "| --- " + "|"
    )
    calls = [(ours, False), (ours, True), (sdpa, False), (sdpa, True)]
    base = [memory_of(call.format(n=8), backward) for call, backward in calls]
    for n in (32, 64, 128):
        cells = [memory_of(call.format(n=n), backward) - b for (call, backward), b in zip(calls, base, strict=True)]
        print(f"| {n} x {n} | " + " | ".join(f"{c / 2**20:.0f} MiB" for c in cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times neighborhood attention against natten, SDPA and FlexAttention.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--specs", default="", help="only specs whose name contains this text")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled FlexAttention")
    parser.add_argument("--no-natten", action="store_true", help="leave out natten, which takes seconds a call")
    parser.add_argument("--memory", action="store_true", help="print peak memory by number of tokens, and nothing else")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    if options.memory:
        memory()
        return
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*flex_attention.*")
    path = None if options.dry else RESULTS / "neighborhood_attention.jsonl"
    recorder = Recorder("neighborhood_attention", path, sources=[PACKAGE / s for s in SOURCES])
    for spec in BENCH_SPECS:
        if options.specs not in spec.name:
            continue
        for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            measure(recorder, spec, f"{spec.name} {label}", dtype, options)
    print(recorder.table("SDPA, dense mask"))


def measure(recorder, spec, label, dtype, options) -> None:
    q, k, v, window, _, _, causal, *_ = spec.args(dtype)
    mask = window_mask(q, window, causal)
    ours = lambda q, k, v: neighborhood_attention(q, k, v, window, is_causal=causal).output  # noqa: E731
    functions = {"SDPA, dense mask": lambda q, k, v: sdpa(q, k, v, mask)}
    if not options.no_natten and importlib.util.find_spec("natten"):
        functions["natten (flex)"] = natten_flex(q.dim() - 3, window, causal)
    if not options.no_compile:
        torch._dynamo.reset()
        functions["flex, compiled"] = flex(mask, mask.size(0))
    functions["eff"] = ours
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        truth = sdpa(q.float(), k.float(), v.float(), mask)
        found = [provider(name, lambda f=f: f(q, k, v), truth, tolerance) for name, f in functions.items()]
        recorder.run(label, found, mode="forward", rounds=options.rounds)
    leaves, grad = [t.clone().requires_grad_() for t in (q, k, v)], torch.randn_like(q)
    wide = [t.detach().float().requires_grad_() for t in leaves]
    truth = gradients(lambda *t: sdpa(*t, mask), wide, grad.float())
    functions = {"SDPA, dense mask": functions["SDPA, dense mask"], "eff": ours}
    found = [
        provider(name, lambda f=f: gradients(f, leaves, grad), truth, 10 * tolerance) for name, f in functions.items()
    ]
    recorder.run(label, found, mode="forward + backward", rounds=options.rounds)


main()
