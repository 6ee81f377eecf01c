"""What head guidance does on collage diffusion, and what a step costs beside diffusers' own.

``python bench/head_guidance.py plant search chance knob speed picture`` appends one line a part to
``bench/results/head_guidance.jsonl``; "plant:6" is "plant" with another draw of heads. All scores are of pictures that
no search has seen, with 95 % intervals by bootstrap over pictures; differences are paired by prompt and seed. CFG is
off unless said.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from eff_guidance.head_guidance import (
    HeadHunter,
    HeadHunterConfig,
    SoftPAGConfig,
    apply_head_guidance,
    list_heads,
    perturbed_heads,
    pipeline_generator,
)
from eff_kernels.testing import environment, mean_interval
from head_guidance_speed import speed

RESULTS = Path(__file__).parent / "results"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "src" / "eff_guidance" / "head_guidance")
STEPS = 8
FRESH = 40  # pictures that a result is scored on
SEARCH_SEED, FRESH_SEED = 1, 2


def world():
    from eff_embedded.diffusion import load_collage_diffusion
    from eff_embedded.judge import load_judge

    return load_collage_diffusion(), load_judge()


class Scorer:
    """Mean odds that the judge gives to the objects asked for, 0 to 1, and whether the relation holds."""

    def __init__(self, judge, cases):
        self.judge, self.cases = judge, {case.prompt: case for case in cases}

    def __call__(self, pictures, prompts):
        odds = self.judge.scores(torch.stack(list(pictures))).presence.sigmoid()
        rows = zip(odds.detach(), prompts, strict=True)
        return [float(np.mean([row[self.judge.objects.index(o)] for o in self.cases[p].objects])) for row, p in rows]

    def placed(self, pictures, prompts):
        readings = zip(self.judge(torch.stack(list(pictures))), prompts, strict=True)
        cases = self.cases
        return [float(r.holds(cases[p].objects[0], cases[p].place, cases[p].objects[1])) for r, p in readings]


class Bench:
    """Pictures of fresh prompts and seeds under several guidances, compared with those without."""

    def __init__(self, pipe, judge, count=FRESH):
        from eff_embedded.diffusion import pairs

        cases = pairs(count, seed=FRESH_SEED)
        self.prompts, self.seeds = [c.prompt for c in cases], [9000 + i for i in range(count)]
        self.scorer, self.pipe = Scorer(judge, cases), pipe
        self.make = pipeline_generator(pipe, batch_size=20, num_inference_steps=STEPS, output_type="pt")
        self.with_cfg = pipeline_generator(
            pipe, batch_size=20, num_inference_steps=STEPS, output_type="pt", guidance_scale=4.0
        )
        self.base = self.scores(SoftPAGConfig(heads=[]))

    def scores(self, config, cfg=False):
        pictures = (self.with_cfg if cfg else self.make)(self.prompts, self.seeds, config)
        return {
            "objects": self.scorer(pictures, self.prompts),
            "placed": self.scorer.placed(pictures, self.prompts),
            "pictures": pictures,
        }

    def row(self, name, config, base=None, cfg=False, found=None):
        base, found = base or self.base, found or self.scores(config, cfg)
        made = {
            "name": name,
            "heads": "all" if config.heads == "all" else len(config.heads),
            "scale": config.scale,
            "strength": config.strength,
        }
        for key in ("objects", "placed"):
            made[key] = mean_interval(found[key])
            made[f"{key}_gain"] = mean_interval(np.subtract(found[key], base[key]))
        moved = [float((a - b).abs().mean()) for a, b in zip(found["pictures"], base["pictures"], strict=True)]
        made["moved"] = mean_interval(moved)
        print(made, flush=True)
        return made


def plant(draw=5):
    """Handicap three heads by half a step to the identity: guidance away from the rest of the way undoes that.

    To first order in u, ``v(1/2) + w (v(1/2) - v(1))`` with w = 1 is v(0), for these heads and no other.
    """
    from eff_embedded.diffusion import pairs

    pipe, judge = world()
    heads = list_heads(pipe.transformer)
    dice = np.random.default_rng(draw)
    planted = [heads[i] for i in dice.choice(len(heads), 3, replace=False)]
    others = [h for h in heads if h not in planted]
    cases = pairs(8, seed=SEARCH_SEED)
    scorer = Scorer(judge, cases)
    prompts, seeds = [c.prompt for c in cases], list(range(8))
    make = pipeline_generator(pipe, num_inference_steps=STEPS, output_type="pt")
    clean = make(prompts, seeds, SoftPAGConfig(heads=[]))
    bench = Bench(pipe, judge)
    by_judge = []

    def near(pictures, prompts):
        by_judge.append(float(np.mean(scorer(pictures, prompts))))
        return [-float((a - b).square().mean()) for a, b in zip(pictures, clean, strict=True)]

    handicap = SoftPAGConfig(heads=planted, strength=0.5)
    config = HeadHunterConfig(rounds=1, heads_per_round=3, strength=1.0, scale=1.0)
    with perturbed_heads(pipe.transformer, handicap, order=0):

        def generate(prompts, seeds, guidance):
            pictures = []
            with apply_head_guidance(pipe, guidance, order=1):
                noise = [torch.Generator().manual_seed(seed) for seed in seeds]
                pictures += pipe(
                    prompts, generator=noise, num_inference_steps=STEPS, output_type="pt", guidance_scale=1.0
                ).images
            return pictures

        found = HeadHunter(generate, near, prompts, seeds=seeds, heads=heads, config=config, progress=False).search()
        ranks = [int(i) for i in np.argsort([-s for s in by_judge], kind="stable")]
        judged_rank = {str(tuple(h)): ranks.index(heads.index(h)) + 1 for h in planted}
        bench.make = generate
        hurt = bench.scores(SoftPAGConfig(heads=[]))
        rows = [bench.row("handicapped", SoftPAGConfig(heads=[]), found=hurt)]
        rows.append(bench.row("guided by found heads", found.guidance(), hurt))
        wrong = [others[i] for i in dice.choice(len(others), 3, replace=False)]
        rows.append(bench.row("guided by three others", config.guidance(wrong), hurt))
    clean_row = {"objects": mean_interval(bench.base["objects"]), "placed": mean_interval(bench.base["placed"])}
    return {
        "draw": draw,
        "planted": [tuple(h) for h in planted],
        "found": [tuple(h) for h in found.best()],
        "hits": len(set(found.best()) & set(planted)),
        "rank_by_judge_of_8_pictures": judged_rank,
        "without_handicap": clean_row,
        "rows": rows,
    }


def search():
    """Search by the judge, then score the choice on fresh prompts and seeds beside as many random heads."""
    from eff_embedded.diffusion import pairs

    pipe, judge = world()
    cases = pairs(10, seed=SEARCH_SEED)
    hunter = HeadHunter(
        pipe, Scorer(judge, cases), [c.prompt for c in cases], seeds=range(500, 510), progress=False,
        config=HeadHunterConfig(rounds=1, heads_per_round=6, strength=1.0, scale=2.0),
    )  # fmt: skip
    hunter.generate = pipeline_generator(pipe, batch_size=10, num_inference_steps=STEPS, output_type="pt")
    found = hunter.search(resume=RESULTS / "head_guidance_heads.json")
    heads, bench = list_heads(pipe.transformer), Bench(pipe, judge, 60)
    dice = np.random.default_rng(3)
    rand = [heads[i] for i in dice.choice(len(heads), 6, replace=False)]
    rows = [bench.row("plain", SoftPAGConfig(heads=[]), found=bench.base)]
    rows.append(bench.row("found", found.guidance(scale=1.0)))
    rows.append(bench.row("random", SoftPAGConfig(heads=rand, scale=1.0)))
    cfg = bench.scores(SoftPAGConfig(heads=[]), cfg=True)
    rows.append(bench.row("CFG 4", SoftPAGConfig(heads=[]), found=cfg))
    rows.append(bench.row("CFG 4 and found", found.guidance(scale=1.0), cfg, cfg=True))
    spread = [s for s in found.rounds[0].scores if s is not None]
    return {
        "fresh_pictures": 60,
        "found": [tuple(h) for h in found.best()],
        "search_scores": {"least": min(spread), "median": float(np.median(spread)), "most": max(spread)},
        "rows": rows,
    }


def chance(draws=5):
    """Six random heads, several draws: what the heads of a search have to beat, on the pictures they are scored on."""
    from eff_guidance.head_guidance import HeadSet

    pipe, judge = world()
    heads, bench = list_heads(pipe.transformer), Bench(pipe, judge, 60)
    found = HeadSet.load(RESULTS / "head_guidance_heads.json")
    chosen = bench.scores(found.guidance(scale=1.0))
    rows = [bench.row("found", found.guidance(scale=1.0), found=chosen)]
    gains = {key: [] for key in ("objects", "placed")}
    for draw in range(draws):
        dice = np.random.default_rng(10 + draw)
        config = SoftPAGConfig(heads=[heads[i] for i in dice.choice(len(heads), 6, replace=False)], scale=1.0)
        made = bench.scores(config)
        rows.append(
            {**bench.row(f"random, draw {draw}", config, found=made), "which": [tuple(h) for h in config.heads]}
        )
        for key, values in gains.items():
            values.append(np.subtract(chosen[key], made[key]))
    over = {key: mean_interval(np.mean(values, 0)) for key, values in gains.items()}
    return {"fresh_pictures": 60, "draws": draws, "rows": rows, "found_over_mean_of_random": over}


def knob():
    """All heads, w = 2: how far pictures move and what the judge says, by strength."""
    pipe, judge = world()
    bench = Bench(pipe, judge, 20)
    values = (0.1, 0.25, 0.5, 1.0)
    rows = [bench.row("all heads", SoftPAGConfig(heads="all", scale=2.0, strength=u)) for u in values]
    falls = [a["objects"][0] >= b["objects"][0] for a, b in itertools.pairwise(rows)]
    grows = [a["moved"][0] <= b["moved"][0] for a, b in itertools.pairwise(rows)]
    return {
        "fresh_pictures": 20,
        "rows": rows,
        "score_falls_with_strength": all(falls),
        "distance_grows_with_strength": all(grows),
    }


def picture():
    """A sheet for the docs: one prompt a row, one guidance a column."""
    from eff_guidance.head_guidance import HeadSet
    from PIL import Image, ImageDraw

    pipe, _ = world()
    found = HeadSet.load(RESULTS / "head_guidance_heads.json")
    prompts = [
        "a lion and a rocket",
        "an owl above a car on a pink background",
        "a frog to the left of a crown",
        "a panda and a guitar",
    ]
    nothing = SoftPAGConfig(heads=[])
    columns = {
        "plain": (nothing, 1.0),
        "found, u = 0.5": (found.guidance(strength=0.5, scale=1.0), 1.0),
        "found, u = 1": (found.guidance(scale=1.0), 1.0),
        "all heads, w = 2": (SoftPAGConfig(heads="all", scale=2.0), 1.0),
        "CFG 4": (nothing, 4.0),
        "CFG 4, found": (found.guidance(scale=1.0), 4.0),
    }
    sheet = Image.new("RGB", (132 * len(columns), 20 + 132 * len(prompts)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, (config, cfg)) in enumerate(columns.items()):
        draw.text((132 * column + 4, 4), name, fill="black")
        make = pipeline_generator(pipe, num_inference_steps=12, guidance_scale=cfg)
        for row, image in enumerate(make(prompts, [40, 41, 42, 43], config)):
            sheet.paste(image, (132 * column + 2, 20 + 132 * row))
    path = Path(__file__).parents[3] / "docs" / "images" / "head_guidance.png"
    sheet.quantize(256).save(path, optimize=True)
    return {"file": path.name, "bytes": path.stat().st_size}


def main():
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for part in sys.argv[1:]:
        start = time.process_time()
        with torch.no_grad():
            name, _, draw = part.partition(":")
            parts = {
                "plant": plant, "search": search, "chance": chance, "knob": knob, "speed": speed, "picture": picture,
            }  # fmt: skip
            found = parts[name](*([int(draw)] if draw else []))
        record = {
            "part": name, "fresh_pictures": FRESH, **found, "steps": STEPS, "dtype": "float32",
            "seconds": round(time.process_time() - start, 1), **environment("cpu", SOURCES),
        }  # fmt: skip
        with (RESULTS / "head_guidance.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
