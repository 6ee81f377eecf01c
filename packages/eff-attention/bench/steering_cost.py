"""What each method that steers attention costs in time, beside the same model without it in the same run.

    uvx nox -s bench -- attention steering_cost [--tokens 1000] [--pictures 1] [--rounds 3] [--threads 1]
    uvx nox -s bench -- attention steering_cost --table

SmolLM2 with eyes reads pictures and text, ``--tokens`` together, and then goes on. Each method sits in a copy of the
model that has the same weights in memory. In each round, after one that is not counted, the plain model reads the
prompt before and after each method does, and says a token before and after each of ``--decode`` tokens of the method:
what a method takes is compared with the mean of its two neighbours, as processors change their speed within seconds.
A line for each method goes to results/steering_cost.jsonl.
"""

from __future__ import annotations

import argparse
import copy
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
TARGETS = (1.15, 1.10)  # of the prompt and of a token
KNOWN = "VHR, text known"
METHODS = {
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


def with_method(model, name):
    """A copy of the model that a method is put into; the weights are the same ones."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    treated = copy.deepcopy(model, shared)
    METHODS[name](treated)
    return treated


def say(model, out):
    """A further token after what a model gave."""
    token = out.logits[:, -1:].argmax(-1)
    return timed(lambda: model(input_ids=token, **cache_kwargs(model, returned_cache(out)), use_cache=True))


@torch.inference_mode()
def one_round(plain, treated, inputs, other, decode):
    """Seconds (clock, processor) of the method and of the plain model around it, by method: prompts and tokens."""

    def read(model):
        return timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1))

    prefill, tokens = {}, {}
    out, before = read(plain)
    for name, model in treated.items():
        if name == KNOWN:  # the same question about another picture came before
            model(**other, use_cache=True, logits_to_keep=1)
            out, before = read(plain)
        own, seconds = read(model)
        after = read(plain)
        prefill[name] = [(seconds, mean(before, after[1]))]
        tokens[name] = []
        out, plain_before = say(plain, out)
        for _ in range(decode):
            own, seconds = say(model, own)
            out, plain_after = say(plain, out)
            tokens[name].append((seconds, mean(plain_before, plain_after)))
            plain_before = plain_after
        out, before = after
    return prefill, tokens


def mean(a, b):
    return tuple((x + y) / 2 for x, y in zip(a, b, strict=True))


def measure(args):
    torch.set_num_threads(args.threads)
    model, processor = load_smollm2_eyes(dtype=getattr(torch, args.dtype))
    inputs = inputs_of(processor, args.tokens, args.pictures)
    other = inputs_of(processor, args.tokens, args.pictures, seed=1000)
    treated = {name: with_method(model, name) for name in args.methods}
    found = {name: ([], []) for name in treated}
    one_round(model, treated, inputs, other, 1)
    for number in range(1, args.rounds + 1):
        for kind, by_method in enumerate(one_round(model, treated, inputs, other, args.decode)):
            for name, pairs in by_method.items():
                found[name][kind].extend(pairs)
        write(args, found, number)


def write(args, found, rounds):
    """Lines for what was measured in so many rounds; a later line takes the place of an earlier one in the table."""
    about = environment("cpu", (Path(__file__), *SOURCES))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for name, kinds in found.items():
            # Of the processor, as other work on a shared machine makes the clock run.
            prefill, token = ([own[1] / plain[1] for own, plain in pairs] for pairs in kinds)
            clock = [[own[0] / plain[0] for own, plain in pairs] for pairs in kinds]
            plain = [statistics.median(plain[0] for _, plain in pairs) for pairs in kinds]
            record = {
                "method": name,
                "tokens": args.tokens,
                "pictures": args.pictures,
                "plain_prefill_s": round(plain[0], 4),
                "plain_token_s": round(plain[1], 5),
                "prefill_to_none": round(statistics.median(prefill), 4),
                "token_to_none": round(statistics.median(token), 4),
                "clock_to_none": [round(statistics.median(x), 4) for x in clock],
                "prefill_ratios": [round(min(prefill), 3), round(max(prefill), 3)],
                "token_ratios": [round(x, 3) for x in statistics.quantiles(token, n=4)],
                "rounds": rounds,
                "decode": args.decode,
                "dtype": args.dtype,
                **about,
            }
            file.write(json.dumps(record) + "\n")
            print(name, *(record[n] for n in ("prefill_to_none", "token_to_none", "clock_to_none", "token_ratios")))


def table():
    """The tables of docs/steering.md, from the last record of each method and number of pictures."""
    last = {
        (r["pictures"], r["method"]): r for r in map(json.loads, RESULTS.read_text().splitlines()) if "pictures" in r
    }
    for pictures in sorted({p for p, _ in last}):
        rows = {m: r for (p, m), r in last.items() if p == pictures}
        plain = next(iter(rows.values()))
        print(
            f"\n{pictures} pictures in {plain['tokens']} tokens",
            plain["plain_prefill_s"],
            plain["plain_token_s"],
            "s\n",
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
    parser.add_argument("--decode", type=int, default=8)
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
