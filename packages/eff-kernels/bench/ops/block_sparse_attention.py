"""Benchmark of block_sparse_attention: ``python packages/eff-kernels/bench/ops/block_sparse_attention.py --threads 1``.

Next to it: dense SDPA (which computes more), SDPA with the blocks as a dense mask, and compiled FlexAttention with a
block mask, which skips blocks too but has no backward on a CPU.
"""

import argparse
from pathlib import Path

import eff_kernels
import torch
import torch.nn.functional as F
from eff_kernels import block_sparse_attention
from eff_kernels.ops.block_sparse_attention.reference import expand_map
from eff_kernels.ops.block_sparse_attention.specs import BENCH_SPECS
from eff_kernels.testing import Provider, Recorder, same

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/block_sparse_attention", "op.py", "native/src/block_sparse.c", "native/src/attention_tile.h")


def flex(block_map, n, block):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    chosen = block_map > 0

    def mask(b, h, i, j):
        return chosen[b, h, i // block, j // block]

    blocks = create_block_mask(mask, *block_map.shape[:2], n, n, device="cpu", BLOCK_SIZE=block)
    run = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=blocks)


def gradients(run, leaves, grad):
    return torch.autograd.grad(run(*leaves), leaves, grad)


def main():
    parser = argparse.ArgumentParser(description="Times block_sparse_attention against SDPA and FlexAttention.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only specs whose name contains this text")
    parser.add_argument("--no-compile", action="store_true", help="leave out FlexAttention")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = None if args.dry else RESULTS / "block_sparse_attention.jsonl"
    recorder = Recorder("block_sparse_attention", path, sources=[Path(__file__), *(PACKAGE / s for s in SOURCES)])
    for spec in (s for s in BENCH_SPECS if args.only in s.name):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, block_map, block, *_ = spec.args(dtype)
            n, d = q.shape[2:]
            chosen = int((block_map > 0).sum()) * block * block
            small = n <= 4096
            mask = expand_map(block_map, block, block, n, n) if small else None
            ours = lambda q, k, v, m=block_map, b=block: block_sparse_attention(q, k, v, m, b, b).output  # noqa: E731
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            heads = slice(None) if small else slice(1)  # a mask of 16384 tokens is large enough for one head
            wide = [t[:, heads].double().requires_grad_() for t in (q, k, v)]
            blocks = expand_map(block_map[:, heads], block, block, n, n)

            def check(name, run, mode=None, wide=wide, blocks=blocks, tolerance=tolerance, heads=heads):
                seen = None if name == "dense SDPA" else blocks
                exact = lambda *qkv: F.scaled_dot_product_attention(*qkv, seen)  # noqa: E731
                found, wanted = run(), exact(*wide) if mode is None else gradients(exact, wide, mode[:, heads].double())
                pairs = [(found, wanted)] if mode is None else zip(found, wanted, strict=True)
                return all(same(a[:, heads], w, tolerance=tolerance) for a, w in pairs)

            runs = {"dense SDPA": F.scaled_dot_product_attention}
            if small:
                runs["SDPA, mask"] = lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, m)
                if not args.no_compile and args.threads == 1:
                    runs["flex, compiled"] = flex(block_map, n, block)
            runs["eff"] = ours
            providers = [
                Provider(
                    name,
                    lambda i, run=run, qkv=(q, k, v): run(*qkv),
                    backend="cpu" if name == "eff" else "",
                    check=lambda name=name, run=run, qkv=(q, k, v): check(name, lambda: run(*qkv)),
                )
                for name, run in runs.items()
            ]
            name = f"{spec.name} {'fp32' if dtype == torch.float32 else 'bf16'}"
            recorder.run(name, providers, mode="forward", flops=4 * chosen * d, rounds=args.rounds)
            if not small:
                continue
            leaves, grad = [t.clone().requires_grad_() for t in (q, k, v)], torch.randn_like(q)
            both = [
                Provider(
                    name,
                    lambda i, run=run, leaves=leaves, grad=grad: gradients(run, leaves, grad),
                    backend="cpu" if name == "eff" else "",
                    check=lambda name=name, run=run, leaves=leaves, grad=grad: check(
                        name, lambda: gradients(run, leaves, grad), grad
                    ),
                )
                for name, run in runs.items()
                if not name.startswith("flex")
            ]
            recorder.run(name, both, mode="forward + backward", flops=14 * chosen * d, rounds=args.rounds)
    print(recorder.table("dense SDPA"))


if __name__ == "__main__":
    main()
