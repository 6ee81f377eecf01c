"""What each method that steers attention to pictures does to SmolLM2 with eyes.

    uvx nox -s bench -- attention steering [--pictures 24] [--methods none VAR ...] [--threads 1]
    uvx nox -s bench -- attention steering --speed
    uvx nox -s bench -- attention steering --table
    uvx nox -s bench -- attention steering --draw docs/images/steering.png

Captions and yes/no questions about collages that no training saw, of two worlds: "ordinary", one to three objects with
partners as in the training, and "crowded contrary", four to six objects whose partners are always missing. Questions
answered by no are about a missing partner of something that is there. One line a method and world goes to
results/steering.jsonl: figures with 95 % bootstrap intervals over pictures, and the difference to the plain model on
the same pictures. "--speed" has all methods caption the same four pictures in turn, in rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from eff_attention.contrastive_focus import CarveConfig, carve_answers
from eff_attention.grounded_attention import PAIConfig, PAINTConfig, apply_paint
from eff_attention.head_reinforcement import VHRConfig, apply_vhr
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_attention.visual_sinks import VARConfig, apply_var
from eff_embedded.collages import sample
from eff_embedded.eyes import load_smollm2_eyes
from eff_embedded.eyes.evaluation import DESCRIBE, FIRST_SEED, WORLDS, tempting
from eff_embedded.eyes.scores import answers, ratio, score_caption, yes_no
from eff_kernels.testing import environment

RESULTS = Path(__file__).parent / "results" / "steering.jsonl"
CHOSEN = ("ordinary", "crowded contrary")
TOKENS = 40
# At the paper's tau = 20 no token of a picture is a sink here; 13 is above nine in ten of them.
METHODS = {
    "none": lambda model: contextlib.nullcontext(),
    "VAR": lambda model: apply_var(model, VARConfig(tau=20.0)),
    "VAR, tau 13": lambda model: apply_var(model, VARConfig(dims=(507,), tau=13.0)),
    "VHR": lambda model: apply_vhr(model, VHRConfig()),
    "VHR, alpha 1.2": lambda model: apply_vhr(model, VHRConfig(alpha=1.2)),
    "PAINT": lambda model: apply_paint(model, PAINTConfig()),
    "PAI": lambda model: apply_paint(model, PAIConfig()),
    "ACT": lambda model: apply_act(model, ACTConfig()),
    "CARVE": lambda model: contextlib.nullcontext(),
    "CARVE, kept": lambda model: contextlib.nullcontext(),
}
# The model was trained on single whole pictures. "kept": no black, and the picture's own ratio of sides.
LOOKS = {"CARVE": {}, "CARVE, kept": {"outside": "kept", "ratio": "picture"}}


def asked(collages):
    """One question answered by yes and one by no for each collage where there is one: (collage, question)."""
    found = []
    for i, collage in enumerate(collages):
        given = collage.questions(kinds=("exists",), absent=tempting(collage), synonyms=0.0)
        for wanted in ("yes", "no"):
            found += [(i, q) for q in given if q.answer == wanted][:1]
    return found


def by_carve(model, processor, pairs, tokens, method, batch=16):
    from PIL import Image

    config = CarveConfig(suffix="", final="refined", max_new_tokens=tokens, **LOOKS[method])
    said = []
    for first in range(0, len(pairs), batch):
        some = pairs[first : first + batch]
        pictures = [Image.fromarray(collage.picture) for collage, _ in some]
        said += [out.answer for out in carve_answers(model, processor, pictures, [q for _, q in some], config)]
    return said


def run(model, processor, method, collages):
    """Captions, answers, and seconds of the processor for captions."""
    questions = asked(collages)
    captions = [(c, DESCRIBE) for c in collages]
    pairs = [(collages[i], q.text) for i, q in questions]
    with METHODS[method](model):
        begin = time.process_time()
        if method in LOOKS:
            told = by_carve(model, processor, captions, TOKENS, method)
        else:
            told = answers(model, processor.tokenizer, captions, max_tokens=TOKENS)
        seconds = time.process_time() - begin
        if method in LOOKS:
            said = by_carve(model, processor, pairs, 4, method)
        else:
            said = answers(model, processor.tokenizer, pairs, max_tokens=4)
    return told, said, questions, seconds


def counts(processor, collages, told, said, questions, seconds):
    """Numerators and denominators by picture."""
    scores = [score_caption(text, c.names) for text, c in zip(told, collages, strict=True)]
    right, yes, number = np.zeros((3, len(collages)))
    for (i, q), text in zip(questions, said, strict=True):
        right[i] += yes_no(text) == q.answer
        yes[i] += yes_no(text) == "yes"
        number[i] += 1
    words = [len(text.split()) for text in told]
    tokens = sum(len(processor.tokenizer(text).input_ids) + 1 for text in told)
    ones = [1.0] * len(collages)
    return {
        "chair_i": ([len(s.wrong) for s in scores], [len(s.named) for s in scores]),
        "chair_s": ([float(bool(s.wrong)) for s in scores], ones),
        "recall": ([len(s.there & s.named) for s in scores], [len(s.there) for s in scores]),
        "words": (words, ones),
        "yes_no": (right.tolist(), number.tolist()),
        "said_yes": (yes.tolist(), number.tolist()),
    }, {"seconds_a_caption": seconds / len(collages), "seconds_a_token": seconds / tokens}


def difference(here, there, draws=2000):
    """Ratio here minus ratio there, with a bootstrap over the same pictures."""
    (a, b), (c, d) = ((np.asarray(x, float) for x in pair) for pair in (here, there))
    n = min(len(a), len(c))
    chosen = np.random.default_rng(0).integers(n, size=(draws, n))
    a, b, c, d = (x[:n] for x in (a, b, c, d))
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = a[chosen].sum(1) / b[chosen].sum(1) - c[chosen].sum(1) / d[chosen].sum(1)
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return [round(float(x), 4) for x in (a.sum() / b.sum() - c.sum() / d.sum(), low, high)]


def measure(args):
    torch.set_num_threads(args.threads)
    model, processor = load_smollm2_eyes(dtype=getattr(torch, args.dtype))
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    plain = {r["world"]: r["by_picture"] for r in kept if r["method"] == "none" and "world" in r}
    about = environment("cpu", (Path(__file__), Path(__file__).parents[1] / "src"))
    for method in args.methods:
        for world in args.worlds:
            collages = [sample(FIRST_SEED + i, WORLDS[world]) for i in range(args.pictures)]
            numbers, extra = counts(processor, collages, *run(model, processor, method, collages))
            if method == "none":
                plain[world] = numbers
            record = {
                "method": method,
                "world": world,
                "pictures": args.pictures,
                "first_seed": FIRST_SEED,
                **{name: ratio(*pair).to_dict() for name, pair in numbers.items()},
                "to_none": {n: difference(numbers[n], plain[world][n]) for n in numbers} if world in plain else None,
                "seconds_a_caption": round(extra["seconds_a_caption"], 4),
                "seconds_a_token": round(extra["seconds_a_token"], 4),
                "dtype": args.dtype,
                **about,
                "by_picture": numbers,
            }
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(method, world, {n: record[n] for n in ("chair_i", "recall", "yes_no")}, flush=True)


def speed(args, rounds=3, pictures=4, tokens=16):
    """Time of a caption of ``tokens`` tokens beside the plain model's in the same round."""
    torch.set_num_threads(args.threads)
    model, processor = load_smollm2_eyes(dtype=getattr(torch, args.dtype))
    about = environment("cpu", (Path(__file__), Path(__file__).parents[1] / "src"))
    pairs = [(sample(FIRST_SEED + i, WORLDS["crowded contrary"]), DESCRIBE) for i in range(pictures)]
    model.generation_config.min_new_tokens = tokens  # all of one length
    times = {method: [] for method in args.methods}
    for number in range(rounds + 1):
        for method in args.methods:
            with METHODS[method](model):
                begin = time.perf_counter()
                if method in LOOKS:
                    by_carve(model, processor, pairs, tokens, method)
                else:
                    answers(model, processor.tokenizer, pairs, max_tokens=tokens)
                if number:  # the first round is for warming up
                    times[method].append(time.perf_counter() - begin)
    for method, seconds in times.items():
        shares = [s / t for s, t in zip(seconds, times["none"], strict=True)]
        record = {"part": "speed", "method": method, "pictures": pictures, "tokens": tokens, "rounds": rounds}
        record |= {"seconds_a_caption": round(statistics.median(seconds) / pictures, 4)}
        record |= {"to_none": round(statistics.median(shares), 3), "least": round(min(shares), 3)}
        record |= {"most": round(max(shares), 3), "dtype": args.dtype} | about
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(method, record["to_none"], shares, flush=True)


def table():
    """The table of docs/steering.md, from the last record of each method and world."""
    last, times = {}, {}
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        if record.get("part") == "speed":
            times[record["method"]] = record
        else:
            last[record["world"], record["method"]] = record

    def share(x):
        return f"{100 * x['value']:.0f} ({100 * x['low']:.0f} to {100 * x['high']:.0f})"

    for world in CHOSEN:
        print(f"\n{world}\n\n| method | CHAIR_i % | CHAIR_s % | recall % | words | yes/no right % | time | n |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for method in METHODS:
            if (r := last.get((world, method))) is not None:
                shares = [share(r[n]) for n in ("chair_i", "chair_s", "recall")]
                words, answers_right = f"{r['words']['value']:.1f}", share(r["yes_no"])
                took = f"{times[method]['to_none']:.2f}" if method in times else "-"
                cells = [method, *shares, words, answers_right, took, r["pictures"]]
                print("| " + " | ".join(map(str, cells)) + " |")


def draw(path, seed):
    """A collage with what is told about its 81 tokens drawn over it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from eff_attention.visual_sinks import sink_values
    from eff_embedded.eyes.prompt import pixels, prompt
    from eff_kernels.edit.attention import decoder_attention, observe_attention, rows

    model, processor = load_smollm2_eyes()
    collage = sample(seed, WORLDS["crowded contrary"])
    ids = torch.tensor([processor.tokenizer(prompt(DESCRIBE, 81), add_special_tokens=False).input_ids])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(collage.picture, 126)[None],
    }
    place, names = ids[0] == model.config.image_token_id, decoder_attention(model)
    hidden = []
    hook = model.model.language_model.layers[12].register_forward_pre_hook(
        lambda m, a, k: hidden.append((a[0] if a else k["hidden_states"]).detach()), with_kwargs=True
    )

    def attention():
        seen = []
        with torch.no_grad(), observe_attention(model, lambda c, o: seen.append(rows(c, [-1])), where=names[10:24]):
            model(**inputs)
        return torch.stack(seen).mean((0, 1, 2, 3))[place]

    before = attention()
    with apply_paint(model, PAINTConfig()) as handle:
        local, summary = (t[0, place].float() for t in handle.tokens(inputs))
    hook.remove()
    seen_by_paint = []
    with apply_paint(model, PAINTConfig(), order=1.0), torch.no_grad():  # inside of it the raised logits are seen
        watch = observe_attention(model, lambda c, o: seen_by_paint.append(rows(c, [-1])), where=names[10:24], order=2)
        model(**inputs)
        watch.remove()
    after = torch.stack(seen_by_paint).mean((0, 1, 2, 3))[place]
    shown = [
        ("attention of the last token,\nlayers 10 to 23", before, "magma", (0, float(after.max()))),
        ("the same with PAINT", after, "magma", (0, float(after.max()))),
        ("PAINT: local (bright)\nand summary (white) tokens", local + 2 * summary, "gray", (0, 2)),
        (
            "VAR: size of dimension 507\nin units of the mean, layer 12",
            sink_values(hidden[0], [507])[0, place],
            "viridis",
            None,
        ),
    ]
    figure, axes = plt.subplots(1, 5, figsize=(12.5, 3.1), layout="constrained")
    axes[0].imshow(collage.picture)
    axes[0].set_title("the collage", fontsize=8)
    size = collage.picture.shape[0]
    for axis, (title, values, colours, limits) in zip(axes[1:], shown, strict=True):
        axis.imshow(collage.picture)
        image = axis.imshow(
            values.reshape(9, 9), cmap=colours, alpha=0.65, extent=(0, size, size, 0), interpolation="nearest",
            **({} if limits is None else {"vmin": limits[0], "vmax": limits[1]}),
        )  # fmt: skip
        axis.set_title(title, fontsize=8)
        if colours != "gray":
            figure.colorbar(image, ax=axis, shrink=0.75)
    for axis in axes:
        axis.set_axis_off()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"attention to the picture {before.sum():.3f}, with PAINT {after.sum():.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24, help="of each world")
    parser.add_argument("--speed", action="store_true", help="measure the time of captions, and nothing else")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--worlds", nargs="+", default=list(CHOSEN), choices=list(CHOSEN), metavar="WORLD")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--seed", type=int, default=FIRST_SEED + 3, help="of the collage that is drawn")
    args = parser.parse_args()
    if args.table:
        table()
    elif args.speed:
        speed(args)
    elif args.draw:
        draw(args.draw, args.seed)
    else:
        measure(args)


if __name__ == "__main__":
    main()
