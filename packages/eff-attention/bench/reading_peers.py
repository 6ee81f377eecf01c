"""Reading what heads do: this library's observers beside nnsight, on SmolLM2, for the same numbers.

    uvx nox -s bench -- attention reading_peers [--tokens 256] [--rounds 5] [--threads 1]

Two things are read in one forward pass: the output of each head before the output projection, in all layers, and the
last token's row of attention in six layers. nnsight (NDIF, MIT) reads arguments and results of modules: the first is
an argument of ``o_proj``, the second a result of attention that only the eager implementation gives. Where nnsight is
not installed (pip install nnsight) its lines are left out. One line each goes to results/reading_peers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import eff_attention
import torch
from eff_attention.head_reinforcement import head_outputs
from eff_embedded.language import load_smollm2
from eff_kernels.edit.attention import decoder_attention, observe_attention, rows
from eff_kernels.testing.records import environment

RESULTS = Path(__file__).parent / "results" / "reading_peers.jsonl"
SOURCES = Path(eff_attention.__file__).parent
LAYERS = tuple(range(18, 24))


def heads_here(model, ids):
    found = head_outputs(model, {"input_ids": ids}, range(len(model.model.layers)))
    return [found[layer].flatten(1) for layer in sorted(found)]


def rows_here(model, ids):
    seen, names = [], decoder_attention(model)
    with observe_attention(model, lambda c, o: seen.append(rows(c, [-1])[:, :, 0]), where=[names[i] for i in LAYERS]):
        model(input_ids=ids, use_cache=False)
    return seen


def heads_there(model, ids):
    import nnsight

    traced = nnsight.NNsight(model)
    with traced.trace(input_ids=ids, use_cache=False):
        found = nnsight.save([layer.self_attn.o_proj.input[:, -1] for layer in traced.model.layers])
    return found  # noqa: RET504 - nnsight takes the block above apart


def rows_there(model, ids):
    import nnsight

    traced = nnsight.NNsight(model)
    with traced.trace(input_ids=ids, use_cache=False):
        found = nnsight.save([traced.model.layers[i].self_attn.output[1][:, :, -1] for i in LAYERS])
    return found  # noqa: RET504 - nnsight takes the block above apart


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = environment("cpu", (Path(__file__), SOURCES))
    model, _ = load_smollm2()
    ids = torch.randint(100, 40000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    readers = {
        "outputs of heads": (heads_here, heads_there, "sdpa"),
        "rows of attention": (rows_here, rows_there, "eager"),
    }
    for what, (here, there, implementation) in readers.items():
        with torch.no_grad():
            wanted = here(model, ids)
            for name, read in (("eff", here), ("nnsight", there)):
                model.set_attn_implementation(implementation if name == "nnsight" else "sdpa")
                try:
                    found = read(model, ids)
                except ImportError:
                    print(f"{name} is not installed")
                    continue
                error = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
                seconds = []
                for _ in range(args.rounds):
                    times = []
                    for run in (lambda: model(input_ids=ids, use_cache=False), lambda read=read: read(model, ids)):
                        begin = time.perf_counter()
                        run()
                        times.append(time.perf_counter() - begin)
                    seconds.append(times)
                plain = statistics.median(a for a, _ in seconds)
                took = statistics.median(b for _, b in seconds)
                record = {
                    "what": what,
                    "reader": name,
                    "tokens": args.tokens,
                    "attention": model.config._attn_implementation,
                }
                record |= {"largest_difference": error, "seconds": round(took, 4), "forward_seconds": round(plain, 4)}
                record |= {
                    "times_forward": round(took / plain, 3),
                    "rounds": args.rounds,
                    "check": error < 1e-3,
                } | about
                with RESULTS.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(what, name, record["times_forward"], error, flush=True)
            model.set_attn_implementation("sdpa")


if __name__ == "__main__":
    main()
