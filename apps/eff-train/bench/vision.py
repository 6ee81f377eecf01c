"""Recipes of eff-vision's methods beside their variants and baselines, with seeds.

    python apps/eff-train/bench/vision.py run unip [--seeds 3] [--minutes 13] [--only default]
    python apps/eff-train/bench/vision.py peers specvit
    python apps/eff-train/bench/vision.py table unip

``run`` trains what is not on record yet, a line a run, first seeds first, and ends in time; what is common to the runs
of a method (scenes, what a frozen teacher sees) is made once. ``peers`` adds what needs no training loop. Seconds are
those of the processor in the training alone, one thread. ``outside`` is the share of them in which batches were made.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from eff_kernels.testing import environment
from eff_train import registry
from eff_train.frame import Training, Workers

HERE = Path(__file__).resolve().parent
TRAIN = HERE.parent / "src" / "eff_train"
LIBRARY = HERE.parents[2] / "packages" / "eff-vision" / "src" / "eff_vision"
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "projection-head": {
        "default": {},
        "reweight": {"head": "reweight"},
        "none": {"head": "none"},
        "linear": {"head": "linear"},
        "mlp, nothing dropped": {"drop": 0.0},
    },
    "brain-encoder": {
        "default": {},
        "factorised": {"readout": "factorised"},
        "convolution": {"readout": "convolution"},
        "keys of position": {"keys": "position"},
    },
    "pixpro": {
        "default": {},
        "pixcontrast": {"objective": "pixcontrast"},
        "instance": {"objective": "instance"},
        "fpn + instance": {"architecture": "fpn", "instance_weight": 1.0},
        "vit": {"architecture": "vit"},
        "random": {"steps": 0},
    },
    "unip": {
        "default": {},
        "layer 1": {"layer": 1},
        "layer 12": {"layer": 12},
        "features": {"distil": "features"},
        "no pre-training": {"pretrain": 0, "steps": 150},  # as many updates of segmentation as the others have
        "all layers' pyramid": {"pyramid": "all"},
    },
    "specvit": {
        "default": {},
        "cnn3d": {"network": "cnn3d"},
        "patches standardised": {"standardize": True},
        "random split": {"split": "random", "train": 0.1},
    },
    "mtpano": {
        "default": {},
        "one stream": {"streams": 1},
        "gradients not cut": {"truncate": False},
        "depth stitched": {"depth_labels": "merged"},
    },
    "eoras": {
        "default": {},
        "one frame": {"single": True},
        "collages": {"world": "collages"},
        "collages, one frame": {"world": "collages", "single": True},
        "forward only": {"bidirectional": False},
    },
    "scanpath": {
        "default": {},
        "crops not centred": {"centre_appearance": False},
        "nothing keeps from objects visited": {"inhibition": False},
        "features": {"appearance": "features", "steps": 600},
        "target revealed": {"reveal_target_position": True},
        "no positions": {"position": "none"},
        "sines": {"position": "sine"},
    },
}  # fmt: skip


def record(method: str) -> Path:
    """File of a method's runs."""
    return HERE / "results" / f"{method.replace('-', '_')}.jsonl"


def known(method: str) -> list[dict[str, Any]]:
    """Runs on record."""
    file = record(method)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def conditions(method: str) -> dict[str, Any]:
    """Where and with what a run was made."""
    name = method.replace("-", "_")
    library = LIBRARY / {"mtpano": "panorama", "eoras": "amodal"}.get(name, name)
    code = (HERE / "vision*.py", TRAIN / "frame", TRAIN / "recipes" / f"{name}*", library)
    return {**environment("cpu", code), "dtype": "float32"}


def add(method: str, line: dict[str, Any]) -> None:
    """Put a line on record."""
    record(method).parent.mkdir(exist_ok=True)
    with record(method).open("a") as file:
        file.write(json.dumps({**line, **conditions(method)}) + "\n")


def run(method: str, seeds: int, minutes: float, only: str | None, pictures: Path | None) -> None:
    """Train what is missing."""
    start, cls = time.monotonic(), registry.load(method)
    common: dict[Any, Any] = {}
    for seed in range(seeds):
        for name, options in VARIANTS[method].items():
            if (only and name != only) or any((r["run"], r.get("seed")) == (name, seed) for r in known(method)):
                continue
            if time.monotonic() - start > 60 * minutes:
                return
            one(method, cls, name, seed, options, common, pictures)


def one(
    method: str, cls: Any, name: str, seed: int, options: dict[str, Any], common: dict[Any, Any], pictures: Path | None
) -> None:
    """Train and judge one variant."""
    usual = cls.config_class()
    steps = options.get("steps", usual.steps)
    config = cls.config_class(
        **{**options, "steps": max(1, steps), "seed": seed, "warmup": min(usual.warmup, max(1, steps))}
    )
    recipe = cls(config)
    shared(method, recipe, common)
    training = Training(recipe, Workers(0, 1, torch.device("cpu")))
    make, outside = recipe.batch, 0.0

    def timed(samples: range) -> Any:
        nonlocal outside
        before = time.process_time()
        made = make(samples)
        outside += time.process_time() - before
        return made

    if steps:
        make(range(1))  # what is made once is not a step's
    recipe.batch = timed
    began, wall = time.process_time(), time.monotonic()
    for _ in range(steps):
        training.update()
    seconds, wall = time.process_time() - began, time.monotonic() - wall
    losses = training.read_means() if steps else {}
    with training.judged() as model:
        found = recipe.evaluate(model)
        if pictures:
            (pictures / method / name).mkdir(parents=True, exist_ok=True)
            recipe.samples(model, pictures / method / name)
    keep(method, recipe, common)
    add(method, {
        "run": name, "seed": seed, "options": options, "steps": steps, "metrics": found,
        "loss": losses.get("loss"), "seconds": round(seconds, 2), "wall": round(wall, 1),
        "outside": round(outside / seconds, 4) if steps else None,
        "weights": sum(p.numel() for p in training.model.parameters()),
    })  # fmt: skip


# Cached properties of a recipe that depend on none of the options that vary.
COMMON = {
    "projection-head": ("digits", "textures"),
    "brain-encoder": ("collages", "backbone", "raw_features", "scale", "features", "cortex"),
    "pixpro": ("photographs", "rooms"),
    "unip": ("classes", "pool", "labelled", "test", "teacher", "profile"),
    "specvit": ("pines", "scene"),
    "scanpath": ("sprites", "held_out"),
    "mtpano": ("held_out",),
    "eoras": ("drawn", "held_out"),
}


def shared(method: str, recipe: Any, common: dict[Any, Any]) -> None:
    """Hand over what an earlier run of the same method, in the same world, has made."""
    world = getattr(recipe.config, "world", None)
    for key in COMMON[method]:
        if (world, key) in common:
            recipe.__dict__[key] = common[world, key]


def keep(method: str, recipe: Any, common: dict[Any, Any]) -> None:
    """Keep it for the next."""
    world = getattr(recipe.config, "world", None)
    common |= {(world, key): recipe.__dict__[key] for key in COMMON[method] if key in recipe.__dict__}


def table(method: str) -> str:
    """Means over seeds, with half the distance from the least to the largest, as Markdown."""
    runs = known(method)
    names = list(dict.fromkeys(r["run"] for r in runs))
    keys = list(dict.fromkeys(k for r in runs for k in r["metrics"]))
    lines = ["| run | seeds | " + " | ".join(keys) + " | seconds |", "|" + "---|" * (len(keys) + 3)]
    for name in names:
        mine = [r for r in runs if r["run"] == name]
        cells = [spread([r["metrics"].get(k) for r in mine]) for k in keys]
        lines.append(
            f"| {name} | {len(mine)} | " + " | ".join(cells) + f" | {spread([r.get('seconds') for r in mine])} |"
        )
    return "\n".join(lines)


def spread(values: list[float | None]) -> str:
    """Mean, and half the range."""
    real = [v for v in values if v is not None]
    if not real:
        return ""
    mean = sum(real) / len(real)
    return f"{mean:.3g}" if len(real) == 1 else f"{mean:.3g} +- {(max(real) - min(real)) / 2:.2g}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "peers", "table"))
    parser.add_argument("method", choices=sorted(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=13.0)
    parser.add_argument("--only")
    parser.add_argument("--pictures", type=Path, help="folder for what the recipe shows of each run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "run":
        run(args.method, args.seeds, args.minutes, args.only, args.pictures)
    elif args.verb == "peers":
        import vision_peers

        done = {r["run"] for r in known(args.method)}
        for line in vision_peers.PEERS[args.method]():
            if line["run"] not in done:
                add(args.method, line)
    else:
        print(table(args.method))


if __name__ == "__main__":
    main()
