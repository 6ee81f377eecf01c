"""What head guidance does on collage diffusion, and what a step costs beside diffusers' own guiders.

``python bench/head_guidance.py plant search knob speed picture`` appends one line a part to
``bench/results/head_guidance.jsonl``. All scores are of pictures that no search has seen, with 95 % intervals by
bootstrap over pictures; differences are paired by prompt and seed. CFG is off unless said.
"""

import copy
import datetime
import itertools
import json
import platform
import subprocess
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
    heads_of_layers,
    list_heads,
    perturbed_heads,
    pipeline_generator,
)
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = Path(__file__).parent / "results"
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


def interval(values):
    data = np.asarray(values, float)
    draws = data[np.random.default_rng(0).integers(len(data), size=(4000, len(data)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return [round(float(x), 4) for x in (data.mean(), low, high)]


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
            made[key] = interval(found[key])
            made[f"{key}_gain"] = interval(np.subtract(found[key], base[key]))
        moved = [float((a - b).abs().mean()) for a, b in zip(found["pictures"], base["pictures"], strict=True)]
        made["moved"] = interval(moved)
        print(made, flush=True)
        return made


def plant():
    """Handicap three heads by half a step to the identity: guidance away from the rest of the way undoes that.

    To first order in u, ``v(1/2) + w (v(1/2) - v(1))`` with w = 1 is v(0), for these heads and no other.
    """
    from eff_embedded.diffusion import pairs

    pipe, judge = world()
    heads = list_heads(pipe.transformer)
    dice = np.random.default_rng(5)
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
    clean_row = {"objects": interval(bench.base["objects"]), "placed": interval(bench.base["placed"])}
    return {
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


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


def measure(runs, rounds=5):
    """Times of functions in turn, so that a busy machine slows all alike, as ratios to the first of each round."""
    made = []
    for run in runs.values():
        with Largest() as seen:
            run()
        made.append(round(seen.bytes / 2**20, 2))
    times = np.zeros((rounds, len(runs)))
    for at in range(rounds):
        for place, run in enumerate(runs.values()):
            start = time.process_time()
            run()
            times[at, place] = 1e3 * (time.process_time() - start)
    ratios = times / times[:, :1]
    return [
        {
            "name": name,
            "ms": round(float(np.median(times[:, k])), 1),
            "passes": [round(float(x), 2) for x in np.quantile(ratios[:, k], [0.5, 0.2, 0.8])],
            "largest_mib": made[k],
        }
        for k, name in enumerate(runs)
    ]


def measured(runs):
    """`measure` of those that run; what a peer cannot do is a result too."""
    failed = []
    for name in list(runs):
        try:
            runs[name]()
        except Exception as error:
            failed.append({"name": name, "error": f"{type(error).__name__}: {error}"[:200]})
            del runs[name]
    return measure(runs) + failed


def sd3(blocks=4, heads=6):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=4, num_layers=blocks, attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=64, caption_projection_dim=64 * heads, pooled_projection_dim=64,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 64, 64), "encoder_hidden_states": torch.randn(1, 77, 64),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.full((1,), 400.0),
    }  # fmt: skip
    return model.eval(), given


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128), layers_per_block=1, attention_head_dim=(4, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
    )  # fmt: skip
    given = {
        "sample": torch.randn(1, 4, 32, 32),
        "timestep": torch.tensor(400),
        "encoder_hidden_states": torch.randn(1, 77, 64),
    }
    return model.eval(), given


def guided(guider, model, given, prompts):
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(400))
    batches = guider.prepare_inputs(prompts)
    for batch in batches:
        guider.prepare_models(model)
        batch.noise_pred = model(**{**given, **{n: getattr(batch, n) for n in prompts}}, return_dict=False)[0]
        guider.cleanup_models(model)
    return guider(batches).pred


def speed():
    """Time and largest tensor of one guided step: 1,101 tokens in SD3's class, 1,024 in a UNet's first blocks."""
    from diffusers import PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
    from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0
    from eff_guidance.head_guidance import SoftPAGGuidance

    def runs_of(model, given, prompts, guiders):
        runs = {"one pass": lambda: model(**given)}
        for name, guider in guiders.items():
            own = copy.deepcopy(model)  # a guider that raises may leave its hooks behind
            runs[name] = lambda guider=guider, own=own: guided(guider, own, given, prompts)
        return runs

    model, given = sd3(blocks=3)
    prompts = {n: (given[n], given[n]) for n in ("encoder_hidden_states", "pooled_projections")}
    layer = heads_of_layers(model, 1)
    ours = {
        "2 heads": {"heads": [(1, 0), (1, 3)], "strength": 0.5},
        "one layer": {"heads": layer, "strength": 0.5},
        "all heads": {"heads": "all", "strength": 0.5},
        "one layer, image_identity": {"heads": layer, "target": "image_identity"},
        "one layer, image_renorm": {"heads": layer, "target": "image_renorm"},
        "one layer, max": {"heads": layer, "target": "max"},
        "one layer, slerp": {"heads": layer, "strength": 0.5, "path": "slerp"},
    }
    guiders = {f"SoftPAG, {name}": SoftPAGGuidance(guidance_scale=1.0, **more) for name, more in ours.items()}
    guiders["SoftPAG, one layer, with CFG"] = SoftPAGGuidance(guidance_scale=4.0, heads=layer, strength=0.5)
    skip = LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    guiders["diffusers SkipLayerGuidance, with CFG"] = SkipLayerGuidance(4.0, 2.0, 0.0, 1.0, skip_layer_config=skip)
    runs = runs_of(model, given, prompts, guiders)
    pag = copy.deepcopy(model)
    pag.transformer_blocks[1].attn.set_processor(PAGJointAttnProcessor2_0())
    twice = {k: torch.cat([v, v]) for k, v in given.items()}
    runs["diffusers SD3 PAG processor, one layer"] = lambda: pag(**twice)
    rows = {"sd3": measured(runs)}

    model, given = unet()
    prompts = {"encoder_hidden_states": (given["encoder_hidden_states"],) * 2}
    where = "down_blocks.0.attentions.0.transformer_blocks"
    scores = LayerSkipConfig(indices=[0], fqn=where, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    blur = SmoothedEnergyGuidanceConfig(indices=[0], fqn=where)
    whole = LayerSkipConfig(indices=[0], fqn=where, skip_attention=True, skip_ff=True)
    layer = heads_of_layers(model, 0)
    guiders = {
        "SoftPAG, one layer, with CFG": SoftPAGGuidance(guidance_scale=4.0, heads=layer, strength=0.5),
        "SoftPAG, one layer, query_mean, with CFG": SoftPAGGuidance(
            guidance_scale=4.0, heads=layer, target="query_mean"
        ),
        "diffusers PAG, with CFG": PerturbedAttentionGuidance(4.0, 2.0, 0.0, 1.0, perturbed_guidance_config=scores),
        "diffusers SEG, with CFG": SmoothedEnergyGuidance(
            4.0, 2.0, 9999999.0, True, 0.0, 1.0, seg_guidance_config=blur
        ),
        "diffusers SkipLayerGuidance, with CFG": SkipLayerGuidance(4.0, 2.0, 0.0, 1.0, skip_layer_config=whole),
    }
    runs = runs_of(model, given, prompts, guiders)
    rows["unet"] = measured(runs)
    for row in rows["sd3"] + rows["unet"]:
        print(row, flush=True)
    return {"rows": rows}


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
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    for part in sys.argv[1:]:
        start = time.process_time()
        with torch.no_grad():
            found = {"plant": plant, "search": search, "knob": knob, "speed": speed, "picture": picture}[part]()
        record = {
            "part": part, "fresh_pictures": FRESH, **found, "steps": STEPS, "threads": 1, "dtype": "float32",
            "seconds": round(time.process_time() - start, 1), "commit": commit, "torch": torch.__version__,
            "processor": names[0].partition(": ")[2] if names else platform.processor(),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        with (RESULTS / "head_guidance.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
