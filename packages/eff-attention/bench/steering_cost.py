"""What each method that steers attention costs in time, beside the same model without it in the same run.

    uvx nox -s bench -- attention steering_cost [--tokens 1000] [--rounds 3] [--threads 1]
    uvx nox -s bench -- attention steering_cost --table

SmolLM2 with eyes reads a picture and text, ``--tokens`` together, and then says ``--decode`` tokens. All methods take
turns in each round, after one that is not counted; a line for each goes to results/steering_cost.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import eff_attention
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
SOURCES = Path(eff_attention.__file__).parent
METHODS = {
    "none": lambda model: contextlib.nullcontext(),
    "VAR": lambda model: apply_var(model, VARConfig(dims=(507,))),
    "VAR, tau 13": lambda model: apply_var(model, VARConfig(dims=(507,), tau=13.0)),
    "VHR": lambda model: apply_vhr(model, VHRConfig()),
    "PAINT": lambda model: apply_paint(model, PAINTConfig()),
    "PAI": lambda model: apply_paint(model, PAIConfig()),
    "ACT": lambda model: apply_act(model, ACTConfig()),
}


def inputs_of(processor, tokens):
    """A prompt of a picture and text of so many tokens."""
    text = prompt("Tell me more. " * tokens, 81)
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.tensor([ids[:tokens]])
    picture = pixels(sample(FIRST_SEED, WORLDS["ordinary"]).picture, 126)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture}


@torch.inference_mode()
def timed(model, inputs, decode):
    """Seconds of the prompt, and of one further token on average."""
    begin = time.perf_counter()
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - begin
    token = out.logits[:, -1:].argmax(-1)
    begin = time.perf_counter()
    for _ in range(decode):
        out = model(input_ids=token, **cache_kwargs(model, returned_cache(out)), use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return prefill, (time.perf_counter() - begin) / decode


def measure(args):
    torch.set_num_threads(args.threads)
    model, processor = load_smollm2_eyes(dtype=getattr(torch, args.dtype))
    inputs = inputs_of(processor, args.tokens)
    times = {name: [] for name in args.methods}
    for number in range(args.rounds + 1):
        for name in args.methods:
            with METHODS[name](model):
                found = timed(model, inputs, args.decode)
            if number:
                times[name].append(found)
    about = environment("cpu", (Path(__file__), SOURCES))
    middle = {n: [statistics.median(x) for x in zip(*found, strict=True)] for n, found in times.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for name, (prefill, token) in middle.items():
            record = {
                "method": name,
                "tokens": args.tokens,
                "prefill_s": round(prefill, 5),
                "token_s": round(token, 6),
                "prefill_to_none": round(prefill / middle["none"][0], 4),
                "token_to_none": round(token / middle["none"][1], 4),
                "spread": [[round(max(x) / min(x), 3)] for x in zip(*times[name], strict=True)],
                "rounds": args.rounds,
                "dtype": args.dtype,
                **about,
            }
            file.write(json.dumps(record) + "\n")
            print(name, record["prefill_to_none"], record["token_to_none"], record["prefill_s"], record["token_s"])


def table():
    """The table of docs/steering.md, from the last record of each method."""
    last = {r["method"]: r for r in map(json.loads, RESULTS.read_text().splitlines())}
    print("| method | prompt, times the plain model | token, times the plain model |\n| --- | --- | --- |")
    for name, r in last.items():
        if name != "none":
            print(f"| {name} | {r['prefill_to_none']:.2f} | {r['token_to_none']:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000)
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
