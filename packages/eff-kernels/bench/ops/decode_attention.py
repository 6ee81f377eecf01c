"""Benchmark of decode_attention: ``python packages/eff-kernels/bench/ops/decode_attention.py --threads 1``.

One query a sequence over a bfloat16 cache, with the heads of SmolLM2-135M and of Llama-3-8B. The peers get the cache in
the form that they want: repeated key-value heads are made outside of the measured time for "SDPA, repeated".
"""

import argparse
from pathlib import Path

import eff_kernels
import torch
import torch.nn.functional as F
from eff_kernels import decode_attention
from eff_kernels.ops.decode_attention import reference
from eff_kernels.ops.decode_attention.specs import paged
from eff_kernels.testing import Provider, Recorder, same

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/decode_attention", "op.py", "native/call.py", *(
    f"native/src/{name}" for name in ("decode_attention.c", "decode_block.h", "attention_tile.h")
))  # fmt: skip
SHAPES = {"9/3 heads of 64": (9, 3, 64), "32/8 heads of 128": (32, 8, 128)}
PAGE = 32


def eager(q, k, v):
    """As transformers' eager attention: softmax in float32."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    scores = (q[:, :, None] @ k.mT) * q.size(-1) ** -0.5
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v)[:, :, 0]


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def repeated(q, k, v):
    return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times decode_attention against eager, torch.compile and SDPA.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = None if options.dry else RESULTS / "decode_attention.jsonl"
    recorder = Recorder("decode_attention", path, sources=[PACKAGE / s for s in SOURCES])
    for label, (heads, groups, d) in SHAPES.items():
        for batch, keys in ((1, 256), (1, 2048), (16, 2048)):
            q = torch.randn(batch, heads, d).bfloat16()
            k, v = (torch.randn(batch, groups, keys, d).bfloat16() for _ in range(2))
            wide = [t.repeat_interleave(heads // groups, 1) for t in (k, v)]
            lengths = torch.full((batch,), keys, dtype=torch.int32)
            pages = paged(k, v, PAGE, torch.Generator().manual_seed(0))
            functions = {"eager": lambda q=q, k=k, v=v: eager(q, k, v), "SDPA": lambda q=q, k=k, v=v: sdpa(q, k, v)}
            functions["SDPA, repeated"] = lambda q=q, wide=wide: repeated(q, *wide)
            if not options.no_compile:
                torch._dynamo.reset()
                compiled = torch.compile(eager, dynamic=False)
                functions["torch.compile"] = lambda q=q, k=k, v=v, compiled=compiled: compiled(q, k, v)
            functions["eff, paged"] = lambda q=q, p=pages, n=lengths: decode_attention(q, *p[:2], n, block_table=p[2])
            functions["eff"] = lambda q=q, k=k, v=v, n=lengths: decode_attention(q, k, v, n)
            with torch.inference_mode():
                truth = reference.decode_attention(q.double(), k.double(), v.double(), lengths, None, 0, d**-0.5)
                found = [
                    Provider(
                        name,
                        lambda i, f=f: f(),
                        backend="cpu" if "eff" in name else "",
                        check=lambda f=f, t=truth: same(f(), t, tolerance=2e-2),
                    )
                    for name, f in functions.items()
                ]
                nbytes = 2 * k.nbytes + 2 * q.nbytes
                recorder.run(
                    f"{label}, {batch} x {keys} keys", found, mode="cache", bytes=nbytes, rounds=options.rounds
                )
    print(recorder.table("SDPA"))


main()
