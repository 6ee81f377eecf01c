"""Benchmark of taylor_linear_attention and self_gated_scan beside standard attention.

``python packages/eff-kernels/bench/ops/causal_variants.py --threads 1``. Eager and compiled PyTorch compute the same
function by the matrix of all weights, up to 2048 tokens; SDPA computes softmax attention, which these two stand in for.
Where flash-linear-attention is installed, its way without a GPU is measured too (``fla.ops.based.naive``).
"""

import argparse
import importlib.util
from pathlib import Path

import eff_kernels
import torch
import torch.nn.functional as F
from eff_kernels import self_gated_scan, taylor_linear_attention
from eff_kernels.testing import Provider, Recorder, same

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
LONGEST_MATRIX = 2048


def taylor(q, k, v):
    score = q @ k.mT * q.size(-1) ** -0.5
    weight = (1 + score + score.square() / 2).tril()
    return weight / weight.sum(-1, keepdim=True) @ v


def gated(score, v):
    seen = torch.ones(score.size(-1), score.size(-1), dtype=torch.bool).tril()
    return score.unsqueeze(-2).masked_fill(~seen, -torch.inf).softmax(-1) @ v


OPS = {
    "taylor_linear_attention": (lambda *x: taylor_linear_attention(*x).output, taylor, ["chunks", "reference", "api"]),
    "self_gated_scan": (lambda *x: self_gated_scan(*x).output, gated, ["cpu", "reference", "api"]),
}


def gradients(run, inputs, grad):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


def forward(run, inputs, _):
    return lambda: run(*inputs)


def measure(name, recorder, tokens, dim, rounds) -> None:
    ours, eager, _ = OPS[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 8, tokens, dim, generator=generator) for _ in range(4))
    inputs = (q, k, v) if name.startswith("taylor") else (q[..., 0].contiguous(), v)
    label = f"8 heads of {dim}, {tokens} tokens fp32"
    for mode, make in (("forward", forward), ("forward + backward", gradients)):
        softmax = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        sdpa, run = make(softmax, (q, k, v), grad), make(ours, inputs, grad)

        def one_head(function, inputs, make=make):
            """The same in float64 for the first head alone: matrices of 8192 tokens are large."""
            return make(function, [t[:, :1].double() for t in inputs], grad[:, :1].double())()

        exact, truth = one_head(softmax, (q, k, v)), one_head(eager, inputs)

        def close(run, wanted, mode=mode):
            found = run()
            first = found[:, :1] if mode == "forward" else [g[:, :1] for g in found]
            return same(first, wanted, tolerance=1e-4)

        providers = [Provider("SDPA (softmax)", lambda i, f=sdpa: f(), check=lambda f=sdpa, w=exact: close(f, w))]
        if tokens <= LONGEST_MATRIX:
            plain, compiled = make(eager, inputs, grad), make(torch.compile(eager, dynamic=False), inputs, grad)
            functions = {"eager": plain, "compiled": compiled}
            if name.startswith("taylor") and importlib.util.find_spec("fla") is not None:
                from fla.ops.based.naive import naive_parallel_based

                functions["fla, naive"] = make(naive_parallel_based, inputs, grad)
            for title, f in functions.items():
                providers.append(Provider(title, lambda i, f=f: f(), check=lambda f=f, w=truth: close(f, w)))
        right = lambda f=run, w=truth: close(f, w)  # noqa: E731
        providers.append(Provider("eff", lambda i, f=run: f(), backend="cpu", check=right))
        recorder.run(label, providers, mode=mode, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the linear stand-ins of attention.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 16])
    parser.add_argument("--ops", nargs="*", default=list(OPS))
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.ops:
        sources = [PACKAGE / f"ops/{name}/{f}.py" for f in OPS[name][2]] + [PACKAGE / "op.py"]
        recorder = Recorder(name, None if options.dry else RESULTS / f"{name}.jsonl", sources=sources)
        for dim in options.dims if name.startswith("taylor") else options.dims[:1]:
            for tokens in options.tokens:
                torch._dynamo.reset()
                measure(name, recorder, tokens, dim, options.rounds)
        print(recorder.table("SDPA (softmax)"))


main()
