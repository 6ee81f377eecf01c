"""ACT on SmolLM2 itself: multiple-choice questions, heads chosen on some and scored on others.

    uvx nox -s bench -- attention act_tasks [--seeds 0 1 2] [--questions 100] [--threads 1]
    uvx nox -s bench -- attention act_tasks --table

Two tasks that are made here. "facts": four people, each with a thing of a colour; which colour has the thing of one?
The four colours are the choices. "kinds": is a word an animal, a food or a vehicle (words of the collages' vocabulary;
two examples first)? The answer is the choice whose first token is likeliest. For each seed, `search_heads` tries the
heads with the heaviest sinks on 24 questions of each task; then the plain model, ACT on the chosen heads and ACT on all
heads answer questions that the search has not seen. One line for each seed and method goes to results/act_tasks.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from eff_attention.sink_calibration import ACTConfig, apply_act, search_heads
from eff_embedded.collages.vocabulary import things
from eff_embedded.eyes.scores import ratio
from eff_embedded.language import load_smollm2
from eff_kernels.testing.records import environment

RESULTS = Path(__file__).parent / "results" / "act_tasks.jsonl"
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Mark")
THINGS = ("hat", "bag", "ball", "book", "coat", "cup", "lamp", "box", "chair", "bike")
KINDS = ("animal", "food", "vehicle")
SEARCHED = 24


def facts(random):
    """Prompt, choices and the number of the right one."""
    names, objects = random.choice(NAMES, 4, replace=False), random.choice(THINGS, 4, replace=False)
    colours = random.choice(COLOURS, 4, replace=False)
    told = " ".join(f"{n} has a {c} {o}." for n, c, o in zip(names, colours, objects, strict=True))
    right = int(random.integers(4))
    return f"{told} The colour of {names[right]}'s {objects[right]} is", list(colours), right


def kinds(random):
    known = [(name, KINDS.index(t.classes[0])) for name, t in things().items() if t.classes and t.classes[0] in KINDS]
    picked = [known[i] for i in random.choice(len(known), 3, replace=False)]
    lines = [f"Question: Is a {name} an animal, a food or a vehicle?\nAnswer:" for name, _ in picked]
    shown = "".join(f"{line} {KINDS[kind]}\n" for line, (_, kind) in zip(lines[:2], picked[:2], strict=True))
    return shown + lines[2], list(KINDS), picked[2][1]


TASKS = {"facts": facts, "kinds": kinds}


class Questions:
    """Questions of both tasks, as tokens; answers of a model to them."""

    def __init__(self, tokenizer, count, seed):
        self.tokenizer, self.by_task = tokenizer, {}
        for number, (name, make) in enumerate(TASKS.items()):
            random = np.random.default_rng([seed, number])
            self.by_task[name] = [make(random) for _ in range(count)]

    @torch.inference_mode()
    def right(self, model):
        """1.0 for each question that is answered right, by task."""
        found = {}
        for name, questions in self.by_task.items():
            found[name] = []
            for first in range(0, len(questions), 25):
                some = questions[first : first + 25]
                given = self.tokenizer(
                    [q[0] for q in some],
                    return_tensors="pt",
                    padding=True,
                    padding_side="left",
                    return_token_type_ids=False,
                )
                logits = model(**given, logits_to_keep=1, use_cache=False).logits[:, -1].float()
                for row, (_, choices, right) in zip(logits, some, strict=True):
                    ids = [self.tokenizer(" " + c, add_special_tokens=False).input_ids[0] for c in choices]
                    found[name].append(float(int(row[ids].argmax()) == right))
        return found


def interval(values):
    """Mean with a 95 % bootstrap interval."""
    return ratio(values, np.ones(len(values))).to_dict()


def measure(args):
    torch.set_num_threads(args.threads)
    about = environment("cpu", (Path(__file__), Path(__file__).parents[1] / "src"))
    model, tokenizer = load_smollm2(dtype=getattr(torch, args.dtype))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for seed in args.seeds:
        searched, scored = Questions(tokenizer, SEARCHED, 2 * seed), Questions(tokenizer, args.questions, 2 * seed + 1)
        found = search_heads(model, searched.right, ACTConfig(), max_evals=args.heads)
        plain = scored.right(model)
        variants = {"none": None, "ACT, chosen heads": found.config, "ACT, all heads": ACTConfig()}
        for method, config in variants.items():
            if config is None or not config.heads:
                right = plain
            else:
                with apply_act(model, config):
                    right = scored.right(model)
            record = {"method": method, "seed": seed, "heads_tried": len(found.trials)}
            record["heads"] = {str(k): list(v) for k, v in found.heads.items()} if "chosen" in method else None
            record["search_gain"] = found.ranked[0].gain
            for name, values in right.items():
                record[name] = interval(values)
                record[f"{name}_to_none"] = interval(np.subtract(values, plain[name]))
            record |= {"right": right, "dtype": args.dtype} | about
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(seed, method, {n: record[n]["value"] for n in TASKS}, record["heads"], flush=True)


def table():
    """The table of docs/methods/sink_calibration.md: all seeds together, from the last record of each."""
    last = {}
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        last[record["method"], record["seed"]] = record
    seeds = sorted({seed for _, seed in last})
    print("| method | " + " | ".join(f"{t}, right % | change" for t in TASKS) + " | seeds |")
    print("| --- |" + " --- |" * (2 * len(TASKS) + 1))
    for method in dict.fromkeys(m for m, _ in last):
        cells = [method]
        for task in TASKS:
            right = np.concatenate([last[method, s]["right"][task] for s in seeds])
            plain = np.concatenate([last["none", s]["right"][task] for s in seeds])
            x, change = interval(right), interval(right - plain)
            cells.append(f"{100 * x['value']:.0f} ({100 * x['low']:.0f} to {100 * x['high']:.0f})")
            cells.append(f"{100 * change['value']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})")
        print("| " + " | ".join([*cells, str(len(seeds))]) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=100, help="of each task, that are scored")
    parser.add_argument("--heads", type=int, default=20, help="heads that the search tries")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    table() if args.table else measure(args)


if __name__ == "__main__":
    main()
