"""What one attention layer with random scores learns, and from how many samples.

    python packages/eff-attention/bench/random_features.py curve|keys|draw|table

"curve" fits RFA, BRFA, the random-feature MLP with as many trained numbers, and RFA's kernel to twelve targets at
growing training sets; "keys" repeats one target with sets of 4 to 64 keys. Both append to
``results/random_features.jsonl``, show where they are, and go on where they were stopped. "draw" makes the pictures,
"table" the table of the page. Fifteen minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from eff_attention.random_features import (
    TARGETS,
    RandomFeatureAttentionRegressor,
    RandomFeatureMLPRegressor,
    RFAKernelRidge,
    sample_complexity_curve,
)
from rich.progress import track

HERE = Path(__file__).parent
RECORD = HERE / "results" / "random_features.jsonl"
IMAGES = HERE.parents[2] / "docs" / "images"
HEADS, DIM, SEEDS = 300, 4, (0, 1, 2)
SIZES = (32, 64, 128, 256, 512, 1024, 2048)
MODELS = {
    "RFA": lambda seed: RandomFeatureAttentionRegressor(HEADS, random_state=100 + seed),
    "BRFA": lambda seed: RandomFeatureAttentionRegressor(HEADS, weight_mean="identity", random_state=100 + seed),
    "RFMLP": lambda seed: RandomFeatureMLPRegressor(HEADS * (DIM + 1), random_state=100 + seed),
    "RFA kernel": lambda seed: RFAKernelRidge(),
}
COLOURS = {"RFA": "#1f77b4", "BRFA": "#d62728", "RFMLP": "#7f7f7f", "RFA kernel": "#1f77b4"}


def done() -> list[dict[str, object]]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def run(kind: str, jobs: list[tuple[str, str, int, int, int]]) -> None:
    """Fit what is not on record; a job is a target, a model, the number of keys, n and a seed."""
    known = {(r["kind"], r["target"], r["model"], r["num_keys"], r["n"], r["seed"]) for r in done()}
    for target, model, num_keys, n, seed in track([j for j in jobs if (kind, *j) not in known], kind):
        # Sets of every size are the beginning of the largest one, so that a curve is made of the same samples.
        points = sample_complexity_curve(target, {model: MODELS[model]}, [n], [seed], num_keys=num_keys, dim=DIM)
        row = {"kind": kind, "num_keys": num_keys, **next(points)._asdict()}
        with RECORD.open("a") as file:
            file.write(json.dumps(row) + "\n")


def curve() -> None:
    sizes = {m: [n for n in SIZES if m != "RFA kernel" or n <= 1024] for m in MODELS}
    run("curve", [(t, m, 16, n, s) for t in TARGETS for m in MODELS for n in sizes[m] for s in SEEDS])


def keys() -> None:
    jobs = [("mean <b,x>^2", m, k, 512, s) for m in ("RFA", "BRFA", "RFMLP") for k in (4, 8, 16, 32, 64) for s in SEEDS]
    run("keys", jobs)


def draw() -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "eff"

    errors = defaultdict(list)
    for r in done():
        errors[r["kind"], r["target"], r["model"], r["num_keys"], r["n"]].append(r["error"])
    figure, axes = plt.subplots(3, 4, figsize=(12, 8), sharex=True, sharey=True, layout="constrained")
    for axis, target in zip(axes.flat, TARGETS, strict=True):
        for model in MODELS:
            sizes = [n for n in SIZES if errors["curve", target, model, 16, n]]
            values = np.array([errors["curve", target, model, 16, n] for n in sizes])
            style = {"color": COLOURS[model], "linestyle": ":" if model == "RFA kernel" else "-"}
            axis.plot(sizes, values.mean(1), label=model, marker=".", **style)
            axis.fill_between(sizes, values.min(1), values.max(1), color=COLOURS[model], alpha=0.15)
        axis.set(xscale="log", yscale="log", title=target, ylim=(1e-5, 3))
        axis.axhline(1, color="black", linewidth=0.5)
    axes[0, 0].legend()
    figure.supxlabel("training samples")
    figure.supylabel("test error / variance")
    figure.savefig(IMAGES / "random_features_curves.svg", metadata={"Date": None})

    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for model in ("RFA", "BRFA", "RFMLP"):
        counts = [4, 8, 16, 32, 64]
        values = np.array([errors["keys", "mean <b,x>^2", model, k, 512] for k in counts])
        axis.plot(counts, values.mean(1), label=model, marker=".", color=COLOURS[model])
        axis.fill_between(counts, values.min(1), values.max(1), color=COLOURS[model], alpha=0.15)
    axis.set(xscale="log", yscale="log", xlabel="keys", ylabel="test error / variance", title="mean <b,x>^2, n = 512")
    axis.set_xticks(counts, map(str, counts))
    axis.minorticks_off()
    axis.legend()
    figure.savefig(IMAGES / "random_features_keys.svg", metadata={"Date": None})


def table() -> str:
    """Mean error over seeds, with the least in bold."""
    errors = defaultdict(list)
    for r in done():
        if r["kind"] == "curve":
            errors[r["target"], r["n"], r["model"]].append(r["error"])
    lines = ["| target | n | " + " | ".join(MODELS) + " |", "| --- | --- | " + "--- | " * len(MODELS)]
    for target in TARGETS:
        for n in (128, 1024):
            means = [float(np.mean(errors[target, n, model])) for model in MODELS]
            cells = [f"**{m:.2g}**" if m == min(means) else f"{m:.2g}" for m in means]
            lines.append(f"| `{target}` | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curve", "keys", "draw", "table"])
    what = parser.parse_args().what
    print(table()) if what == "table" else {"curve": curve, "keys": keys, "draw": draw}[what]()
