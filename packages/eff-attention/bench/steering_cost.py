"""What each method that steers attention costs in time, beside the same model without it in the same run.

    uvx nox -s bench -- attention steering_cost [--tokens 1000] [--pictures 1] [--rounds 3] [--threads 1]
    uvx nox -s bench -- attention steering_cost --table

SmolLM2 with eyes reads pictures and text, ``--tokens`` together, and then goes on. In each round, after one that is not
counted, all methods read the prompt in turn, and then say ``--decode`` tokens in turn, twice: each time is
compared with that of the plain model beside it. A line for each method goes to results/steering_cost.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import eff_attention
import eff_kernels
import torch
from eff_attention.grounded_attention import PAIConfig, PAINTConfig, apply_paint
from eff_attention.head_reinforcement import VHRConfig, apply_vhr
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_attention.visual_sinks import VARConfig, apply_var
from eff_embedded.collages import sample
from eff_embedded.eyes import load_smollm2_eyes
from eff_embedded.eyes.evaluation import FIRST_SEED, WORLDS
from eff_embedded.eyes.prompt import pixels, prompt
from eff_kernels.edit.caches import cache_kwargs, returned_cache
from eff_kernels.testing.records import environment

RESULTS = Path(__file__).parent / "results" / "steering_cost.jsonl"
SOURCES = (Path(eff_attention.__file__).parent, Path(eff_kernels.__file__).parent)
PICTURE_TOKENS = 81
BLOCKS = 2
TARGETS = (1.15, 1.10)  # of the prompt and of a token
KNOWN = "VHR, text known"
METHODS = {
    "none": lambda model: contextlib.nullcontext(),
    "VAR": lambda model: apply_var(model, VARConfig(dims=(507,))),
    "VAR, tau 13": lambda model: apply_var(model, VARConfig(dims=(507,), tau=13.0)),
    "PAINT": lambda model: apply_paint(model, PAINTConfig()),
    "PAI": lambda model: apply_paint(model, PAIConfig()),
    "VHR": lambda model: apply_vhr(model, VHRConfig()),
    KNOWN: lambda model: apply_vhr(model, VHRConfig(), remember=1),
    "ACT": lambda model: apply_act(model, ACTConfig()),
}


def inputs_of(processor, tokens, pictures, seed=0):
    """A prompt of pictures and text of so many tokens."""
    text = prompt("Tell me more. " * tokens, PICTURE_TOKENS * pictures)
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.tensor([ids[:tokens]])
    world = WORLDS["ordinary"]
    seen = [pixels(sample(FIRST_SEED + seed + i, world).picture, 126) for i in range(pictures)]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.stack(seen)}


def timed(run):
    """What ``run`` gives, and the seconds that it took by the clock, and of the processor on all threads."""
    begin, used = time.perf_counter(), time.process_time()
    out = run()
    return out, (time.perf_counter() - begin, time.process_time() - used)


@torch.inference_mode()
def one_round(model, methods, inputs, other, decode):
    """Seconds of the prompt, and of each further token, by method."""
    outs, prefill, tokens = {}, {}, {name: [] for name in methods}
    for name in methods:
        with METHODS[name](model):
            if name == KNOWN:  # the same question about another picture came before
                model(**other, use_cache=True, logits_to_keep=1)
            outs[name], prefill[name] = timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    for _ in range(BLOCKS):
        for name in methods:
            with METHODS[name](model):
                for number in range(decode + 1):
                    token = outs[name].logits[:, -1:].argmax(-1)
                    given = {"input_ids": token, **cache_kwargs(model, returned_cache(outs[name])), "use_cache": True}
                    outs[name], seconds = timed(lambda given=given: model(**given))
                    if number:  # the first comes behind the work of putting rules in
                        tokens[name].append(seconds)
    return prefill, tokens


def measure(args):
    torch.set_num_threads(args.threads)
    model, processor = load_smollm2_eyes(dtype=getattr(torch, args.dtype))
    inputs = inputs_of(processor, args.tokens, args.pictures)
    other = inputs_of(processor, args.tokens, args.pictures, seed=1000)
    methods = list(dict.fromkeys(["none", *args.methods]))
    prefill, token = ({name: [] for name in methods} for _ in range(2))
    for number in range(args.rounds + 1):
        found = one_round(model, methods, inputs, other, args.decode)
        if number:
            for name in methods:
                prefill[name].append(found[0][name])
                token[name] += found[1][name]
            write(args, methods, prefill, token, number)


def write(args, methods, prefill, token, rounds):
    """Lines for what was measured in so many rounds; a later line takes the place of an earlier one in the table."""
    about = environment("cpu", (Path(__file__), *SOURCES))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for name in methods:
            # Of neighbours in time; of the processor, as other work on a shared machine makes the clock run.
            ratios = [[a[1] / b[1] for a, b in zip(x[name], x["none"], strict=True)] for x in (prefill, token)]
            clock = [[a[0] / b[0] for a, b in zip(x[name], x["none"], strict=True)] for x in (prefill, token)]
            record = {
                "method": name,
                "tokens": args.tokens,
                "pictures": args.pictures,
                "prefill_s": round(statistics.median(x[0] for x in prefill[name]), 5),
                "token_s": round(statistics.median(x[0] for x in token[name]), 6),
                "prefill_to_none": round(statistics.median(ratios[0]), 4),
                "token_to_none": round(statistics.median(ratios[1]), 4),
                "clock_to_none": [round(statistics.median(x), 4) for x in clock],
                "prefill_ratios": [round(min(ratios[0]), 3), round(max(ratios[0]), 3)],
                "token_ratios": [round(x, 3) for x in statistics.quantiles(ratios[1], n=4)],
                "rounds": rounds,
                "decode": args.decode,
                "dtype": args.dtype,
                **about,
            }
            file.write(json.dumps(record) + "\n")
            print(name, *(record[n] for n in ("prefill_to_none", "token_to_none", "clock_to_none", "token_s")))


def table():
    """The tables of docs/steering.md, from the last record of each method and number of pictures."""
    last = {
        (r["pictures"], r["method"]): r for r in map(json.loads, RESULTS.read_text().splitlines()) if "pictures" in r
    }
    for pictures in sorted({p for p, _ in last}):
        rows = {m: r for (p, m), r in last.items() if p == pictures}
        plain = rows.pop("none")
        print(
            f"\n{pictures} pictures of {plain['tokens']} tokens, plain: {plain['prefill_s']} s, {plain['token_s']} s\n"
        )
        print("| method | prompt, times the plain model | token, times the plain model |\n| --- | --- | --- |")
        for name, r in sorted(rows.items(), key=lambda item: list(METHODS).index(item[0])):
            both = r["prefill_to_none"], r["token_to_none"]
            cells = [f"{x:.2f}" if x <= limit else f"{x:.2f} (over)" for x, limit in zip(both, TARGETS, strict=True)]
            print(f"| {name} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--decode", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        table()
    else:
        measure(args)


if __name__ == "__main__":
    main()
