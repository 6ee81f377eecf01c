"""SmolLM2 that draws and reads emojis, beside the same tower untrained: ``bench/llamafusion.py RUN [--picture FILE]``.

RUN is the folder of ``eff-train run llamafusion``. Drawings of captions that were trained ("seen") and that were kept
out ("new") are judged for several seeds of the noise: by the judge of collages, which knows pictures alone, and by the
nearest picture of all. ``found_by_chance`` asks the judge for things of other captions on the same drawings. Losses are
on samples of the evaluation, beside that of the best affine function of the noised points ("trivial"). Text is compared
bit by bit with a model that has no tower.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from eff_embedded.language import smollm2_folder
from eff_kernels.testing import environment
from eff_train.frame.metrics import read_metrics
from eff_train.frame.runs import Run, choose_checkpoint, read_checkpoint
from eff_train.frame.training import load_weights
from eff_train.recipes.llamafusion import Config, LlamaFusion, world
from eff_train.recipes.llamafusion.scores import captions_right, drawings_right, trivial_loss
from PIL import Image
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results" / "llamafusion.jsonl"
SOURCES = (
    HERE,
    HERE.parents[1] / "src" / "eff_train" / "recipes" / "llamafusion",
    HERE.parents[3] / "packages" / "eff-adapters" / "src" / "eff_adapters" / "llamafusion",
)
TIMES = (100, 500, 900)
KEPT = ("things", "tokens", "first_layer", "batch_size", "guidance", "prediction")  # options that a record repeats
TEXTS = (
    "The capital of France is Paris, and the Seine runs through it.",
    "a heart on a yellow background",
    "def add(a, b):\n    return a + b\n",
)


def newest(run: Run) -> dict:
    """The state of a run's last checkpoint."""
    return read_checkpoint(choose_checkpoint(run, "last", LlamaFusion.best, print))


def spent(run: Run) -> float:
    """Seconds of a run, the waits of a shared machine included."""
    return max(r["seconds"] for r in read_metrics(run.metrics) if "seconds" in r)


def drawn_by(recipe: LlamaFusion, model, asked, seeds: range):
    """Drawings for each seed of the noise, [seeds, n, 3, 32, 32]."""
    prompts, made = [world.caption(*pair) for pair in asked], []
    for seed in seeds:
        other = LlamaFusion(dataclasses.replace(recipe.config, seed=seed))
        made.append(other.drawn(model, prompts))
    return torch.stack(made)


def by_chance(drawings, asked) -> float:
    """How often the judge finds the thing of a caption that asked for another one."""
    finds = world.found_on(drawings)
    names = sorted({name for name, _ in asked})
    others = [[name in found for name in names if name != own] for (own, _), found in zip(asked, finds, strict=True)]
    return float(np.mean(others))


def drawings_of(recipe: LlamaFusion, model, seeds: range) -> tuple[dict, dict]:
    """Means and standard deviations over seeds, of seen and new captions; and the drawings of the first seed."""
    scores, first = {}, {}
    for kind, asked in recipe.asked().items():
        drawings = drawn_by(recipe, model, asked, seeds)
        rows = [
            {**drawings_right(d, asked, recipe.config.things), "found_by_chance": by_chance(d, asked)} for d in drawings
        ]
        for name in rows[0]:
            values = [row[name] for row in rows]
            scores[f"{kind}_{name}"] = round(float(np.mean(values)), 4)
            scores[f"{kind}_{name}_std"] = round(float(np.std(values, ddof=1)), 4)
        scores[f"{kind}_asked"], first[kind] = len(asked), drawings[0]
    return scores, first


def losses_by_time(recipe: LlamaFusion, model) -> dict[str, float]:
    """Losses of drawings at single times, 96 pictures that are trained with fresh noise, beside the trivial ones."""
    asked = world.pairs(recipe.config.things, seen=True)[:96]
    pictures, found = torch.stack([world.emoji(*pair) for pair in asked]), {}
    context = recipe.context_of([world.caption(*pair) for pair in asked])
    for time in TIMES:
        t = torch.full((len(asked),), time)
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(time))
        draw = {**context, "latents": recipe.latents(pictures), "noise": recipe.latents(noise), "t": t}
        with recipe.arithmetic():
            found[f"loss_{time}"] = round(float(recipe.loss(model, {"draw": draw})[1]["diffusion"]), 4)
        found[f"trivial_{time}"] = round(trivial_loss(t, recipe.config.things, recipe.config.prediction), 4)
    return found


@torch.no_grad()
def text_is_the_same(recipe: LlamaFusion, model) -> bool:
    """Whether logits without pictures have the bits of a model that never had a tower."""
    plain = AutoModelForCausalLM.from_pretrained(
        smollm2_folder(), dtype=next(model.model.parameters()).dtype, attn_implementation="eager"
    ).eval()
    rows = [torch.tensor([recipe.tokenizer(text).input_ids]) for text in TEXTS]
    return all(torch.equal(plain(ids).logits, model.model(ids).logits) for ids in rows)


def sheet(recipe: LlamaFusion, first: dict, file: Path) -> None:
    """Twelve drawings of seen captions above the emojis themselves, then the same of new ones."""
    rows = []
    for kind, asked in recipe.asked().items():
        chosen = range(0, len(asked), max(1, len(asked) // 12))[:12]
        rows.append([world.picture(first[kind][i]) for i in chosen])
        rows.append([world.picture(world.emoji(*asked[i])) for i in chosen])
    points = np.concatenate([np.concatenate([np.asarray(p) for p in row], 1) for row in rows])
    whole = Image.fromarray(points)
    whole.resize((whole.width * 2, whole.height * 2), Image.Resampling.NEAREST).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="of the noise that drawings begin with; two or more")
    parser.add_argument("--drawing-steps", type=int, default=10)
    parser.add_argument("--only", choices=("untrained", "trained"), help="leave out the other tower")
    parser.add_argument("--picture", type=Path, help="where to draw the first drawings of the trained tower")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(args.run)
    config: Config = run.config(Config)
    recipe = LlamaFusion(dataclasses.replace(config, start="", drawing_steps=args.drawing_steps))
    before = Run(Path(config.start)) if config.start else None
    about = {**environment("cpu", SOURCES), "seed": config.seed, "dtype": config.precision, "checked": True}
    torch.manual_seed(config.seed)
    model = recipe.build().eval()
    for method in (args.only,) if args.only else ("untrained", "trained"):
        updates, seconds = 0, 0.0
        if method == "trained":
            state = newest(run)
            load_weights(model, state["weights"])
            updates = state["step"]
            seconds = spent(run) + (spent(before) if before else 0)
        with torch.no_grad():
            scores, first = drawings_of(recipe, model, range(args.seeds))
            found = {n: round(v, 4) for n, v in recipe.losses(model).items()} | losses_by_time(recipe, model)
            for kind, asked in recipe.asked().items():
                told = recipe.read(model, torch.stack([world.emoji(*pair) for pair in asked]))
                found |= {f"{kind}_{n}": round(v, 4) for n, v in captions_right(told, asked).items()}
                print(f"{method}, {kind}:", list(zip(told, [world.caption(*a) for a in asked], strict=True))[:4])
        same = text_is_the_same(recipe, model)
        entry = {
            "method": method, "updates": updates, "seconds": seconds,
            "updates_before": newest(before)["step"] if before and updates else 0, **found, **scores,
            "text_bit_identical": same, "ok": same, "drawing_seeds": args.seeds,
            **{n: getattr(config, n) for n in KEPT},
            "drawing_steps": args.drawing_steps, **about,
        }  # fmt: skip
        print(json.dumps(entry), flush=True)
        if not args.dry:
            with RESULTS.open("a") as file:
                file.write(json.dumps(entry) + "\n")
    if args.picture and args.only != "untrained":
        sheet(recipe, first, args.picture)


if __name__ == "__main__":
    main()
