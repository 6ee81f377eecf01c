"""Draws what `variants.py` recorded, for the documentation."""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "eff"
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of the format

IMAGES = Path(__file__).parents[3] / "docs" / "images"
PERPLEXITY = {  # WikiText, 500M parameters, table of the paper: uniform, hybrid (even)
    "standard": (38.1, None), "mlp": (993.5, 45.8), "approximate": (47.9, 39.4), "non_approximate": (9e4, 39.4),
    "rnd_emb_qk": (84.8, 39.3), "fixed_seq_qk": (79.1, 38.5), "static_emb_qk": (79.9, 38.7),
}  # fmt: skip


def ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def spearman(a: list[float], b: list[float]) -> float:
    x, y = (np.array(ranks(v)) for v in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def draw(record: Path) -> None:
    runs = {(r["kind"], r["layout"]): r for r in map(json.loads, record.open())}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, layout, column in ((axes[0], "uniform", 0), (axes[1], "even", 1)):
        kinds = [k for k in PERPLEXITY if (k, layout) in runs and PERPLEXITY[k][column] is not None]
        theirs, ours = [PERPLEXITY[k][column] for k in kinds], [runs[k, layout]["loss"] for k in kinds]
        axis.scatter(theirs, ours, color="#4c72b0")
        for k, x, y in zip(kinds, theirs, ours, strict=True):
            offset = {"standard": (-42, -12), "fixed_seq_qk": (6, -9), "static_emb_qk": (6, -2), "rnd_emb_qk": (6, 5)}
            axis.annotate(k, (x, y), offset.get(k, (6, 3)), textcoords="offset points", fontsize=8)
        if layout == "uniform":
            axis.set_xscale("log")
        axis.set_title(f"{layout}: rank correlation {spearman(theirs, ours):.2f}", fontsize=10)
        axis.set_xlabel("perplexity in the paper, 500M parameters")
        axis.margins(x=0.35, y=0.15)
        print(layout, f"{spearman(theirs, ours):.2f}")
    axes[0].set_ylabel("loss here, nats a byte")
    save(figure, "variants_loss")
    measures = ("entropy", "concentration", "diversity", "sink")
    figure, axes = plt.subplots(1, 4, figsize=(11, 3))
    for axis, measure in zip(axes, measures, strict=True):
        for (kind, layout), run in runs.items():
            if layout == "uniform" and run["indicators"]:
                layers = sorted(run["indicators"], key=int)
                axis.plot([int(i) for i in layers], [run["indicators"][i][measure] for i in layers], "o-", label=kind)
        axis.set_title(measure, fontsize=10)
        axis.set_xlabel("layer")
        axis.set_xticks([1, 2, 3, 4])
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "variants_indicators")


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
