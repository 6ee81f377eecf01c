"""Benchmark of scale_weights: ``python packages/eff-kernels/bench/ops/attention_shift.py --threads 1``.

"eager" and "torch.compile" compute attention with changed weights from the start. "flash + eff" is attention by
PyTorch's flash kernel, and the change of its output; "eff" the change alone, where a model has computed its attention
anyhow.
"""

import argparse
from pathlib import Path

import eff_kernels
import torch
from eff_kernels import Attended, scale_weights
from eff_kernels.ops.attention_shift import api, reference
from eff_kernels.ops.attention_shift.specs import BENCH_SPECS
from eff_kernels.testing import Provider, Recorder, same, to_float64

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
DTYPES = {"fp32": (torch.float32, 1e-4), "bf16": (torch.bfloat16, 2e-2)}


def eager(q, k, v, out, lse, scale, columns, beta, heads):
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    weights = (q @ key.mT * scale).float().masked_fill(hidden, -torch.inf).softmax(-1)
    of = columns[:, :, None]
    mass = weights.where(of, 0.0).sum(-1, keepdim=True)
    rest = weights.where(~of, 0.0).sum(-1, keepdim=True)
    gain = torch.where(rest > 0, 1 + (1 - beta) * mass / rest, 1.0)
    own = torch.where(rest > 0, beta, 1.0)
    return (torch.where(of, own, gain) * weights).to(v.dtype) @ value


def ours(q, k, v, out, lse, scale, columns, beta, heads):
    return scale_weights(Attended(q, k, v, out, lse, scale), columns, beta, heads, backend="cpu")


def with_flash(q, k, v, out, lse, scale, columns, beta, heads):
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return ours(q, k, v, out, lse, scale, columns, beta, heads)


def provider(name, function, args, wanted, tolerance):
    good = same(function(*args), wanted, tolerance=tolerance)  # compiling happens here
    return Provider(name, lambda _: function(*args), backend="cpu" if "eff" in name else "", check=lambda: good)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--specs", default="", help="only specs whose name contains this text")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sources = [PACKAGE / s for s in ("ops/attention_shift", "native/src/attention_shift.c", "native/call.py", "op.py")]
    path = None if options.dry else RESULTS / "attention_shift.jsonl"
    recorder = Recorder("attention_shift", path, sources=sources)
    for spec in BENCH_SPECS:
        for dtype, (kind, tolerance) in DTYPES.items():
            if options.specs not in spec.name:
                continue
            args = spec.args(kind)
            torch._dynamo.reset()
            functions = {
                "eager": eager,
                "torch.compile": torch.compile(eager, dynamic=False),
                "flash + eff": with_flash,
                "eff": ours,
            }
            with torch.inference_mode():
                wanted = reference.scale_weights(*to_float64(args))
                providers = [provider(name, f, args, wanted, tolerance) for name, f in functions.items()]
                recorder.run(f"{spec.name} {dtype}", providers, mode="forward", rounds=options.rounds)
    print(f"\n{api.SCALE_OP.name}\n{recorder.table()}")


if __name__ == "__main__":
    main()
