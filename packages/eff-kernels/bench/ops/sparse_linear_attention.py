"""Benchmark of sparse_linear_attention, forward and backward; ``--threads 1`` is measured with all peers.

Each "eff, n %" makes its block map in every call and computes both branches. Peers: dense SDPA; compiled FlexAttention
with the map of 10 % ready made, which is the sparse branch alone and has no backward on the CPU; and the reference.
"""

import argparse
import warnings
from pathlib import Path

import eff_kernels
import torch
import torch.nn.functional as F
from eff_kernels import block_map, sparse_linear_attention
from eff_kernels.testing import Provider, Recorder, same

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/sparse_linear_attention", "ops/block_sparse_attention", "op.py", "native/call.py", *(
    f"native/src/{x}" for x in ("block_sparse.c", "linear_attention.c", "attention_tile.h")
))  # fmt: skip
SHAPES = ((8, 4096, 64), (1, 16384, 64))
SHARES = (5, 10, 20, 40)


def ours(q, k, v, share, backend="auto"):
    blocks = block_map(q, k, k_high=share / 100)
    out = sparse_linear_attention(q, k, v, blocks, backend=backend)
    return out.sparse, out.linear


def flex(blocks):
    """Compiled FlexAttention over the critical blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    critical, (m, n) = blocks.mask == 1, (blocks.block_q, blocks.block_k)
    tokens = (critical.size(2) * m, critical.size(3) * n)
    mask = create_block_mask(
        lambda b, h, i, j: critical[b, h, i // m, j // n], 1, critical.size(1), *tokens, device="cpu", BLOCK_SIZE=(m, n)
    )
    run = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=mask)


def measure(recorder, shape, label, dtype, options) -> None:
    heads, length, d = shape
    torch.manual_seed(0)
    # Tokens that resemble their neighbours, as those of pictures do.
    q, k, v = (torch.randn(1, heads, length // 64, 1, d) + torch.randn(1, heads, length // 64, 64, d) for _ in range(3))
    q, k, v = (t.flatten(2, 3).to(dtype) for t in (q, k, v))
    name = f"{length}, {heads}x{d} {label}"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    short = length <= 4096
    with torch.inference_mode():
        dense = F.scaled_dot_product_attention
        exact = dense(q.double(), k.double(), v.double())
        found = [
            Provider("SDPA", lambda i: dense(q, k, v), check=lambda: same(dense(q, k, v), exact, tolerance=tolerance))
        ]
        if short and options.threads == 1:
            run = lambda: ours(q, k, v, 10, "reference")  # noqa: E731
            wanted = sparse_linear_attention(
                *(t.double() for t in (q, k, v)), block_map(q, k, k_high=0.1), backend="reference"
            )
            good = same(run(), wanted[:2], tolerance=tolerance)
            found.append(Provider("reference, 10 %", lambda i, run=run: run(), check=lambda good=good: good))
            if not options.no_compile:
                run = flex(block_map(q, k, k_high=0.1))
                wanted = ours(q.float(), k.float(), v.float(), 10)[0]
                good = same(run(q, k, v), wanted, tolerance=tolerance)
                found.append(Provider("flex, 10 %", lambda i, run=run: run(q, k, v), check=lambda good=good: good))
        for share in SHARES:
            truth = sparse_linear_attention(
                *(t.double() for t in (q, k, v)), block_map(q, k, k_high=share / 100), backend="reference"
            )
            good = same(ours(q, k, v, share), truth[:2], tolerance=tolerance)
            one = Provider(
                f"eff, {share} %", lambda i, s=share: ours(q, k, v, s), backend="cpu", check=lambda g=good: g
            )
            found.append(one)
        recorder.run(name, found, mode="forward", rounds=options.rounds)
    if not short:
        return
    leaves, grad = [t.clone().requires_grad_() for t in (q, k, v)], torch.randn_like(q)
    wide = [t.detach().float().requires_grad_() for t in leaves]

    def train(share, leaves=leaves, backend="auto"):
        return torch.autograd.grad(ours(*leaves, share, backend), leaves, (grad.to(leaves[0].dtype),) * 2)

    def both(leaves):
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad.to(leaves[0].dtype))

    good = same(both(leaves), both([t.detach().double().requires_grad_() for t in leaves]), tolerance=2 * tolerance)
    found = [Provider("SDPA", lambda i: both(leaves), check=lambda good=good: good)]
    for share in (10, 40):
        good = same(train(share), train(share, wide, "reference"), tolerance=2 * tolerance)
        found.append(Provider(f"eff, {share} %", lambda i, s=share: train(s), backend="cpu", check=lambda g=good: g))
    recorder.run(name, found, mode="forward + backward", rounds=options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times sparse-linear attention against SDPA and FlexAttention.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled FlexAttention")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*flex_attention.*")
    path = None if options.dry else RESULTS / "sparse_linear_attention.jsonl"
    recorder = Recorder("sparse_linear_attention", path, sources=[PACKAGE / s for s in SOURCES])
    for shape in SHAPES:
        for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            measure(recorder, shape, label, dtype, options)
    print(recorder.table("SDPA"))


if __name__ == "__main__":
    main()
