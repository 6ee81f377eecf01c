"""Draws what `variants.py` recorded, for the documentation."""

import json
from pathlib import Path

import matplotlib
import numpy as np
from eff_attention.variants import LAYOUTS, standard_layers

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


def draw_maps(maps: dict[str, list[np.ndarray]]) -> None:
    """Rows: layers; columns: mixers. Queries go down, keys to the right; a layer that mixes nothing is the diagonal."""
    figure, axes = plt.subplots(4, len(maps), figsize=(11, 6.6))
    for column, (kind, layers) in enumerate(maps.items()):
        for row, layer in enumerate(layers):
            axis = axes[row, column]
            axis.imshow(np.abs(layer) ** 0.5, vmin=0, vmax=1, cmap="Blues")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(kind, fontsize=9)
            if column == 0:
                axis.set_ylabel(f"layer {row + 1}", fontsize=9)
    save(figure, "variants_maps")


def draw_layouts(depth: int = 24) -> None:
    """A row for each layout, a cell for each layer: dark where it stays standard."""
    figure, axis = plt.subplots(figsize=(7, 2.8))
    cells = np.array([[i in standard_layers(depth, name) for i in range(1, depth + 1)] for name in LAYOUTS], float)
    axis.imshow(0.15 + 0.7 * cells, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_yticks(range(len(LAYOUTS)), list(LAYOUTS), fontsize=9)
    axis.set_xticks(range(3, depth, 4), range(4, depth + 1, 4), fontsize=9)
    axis.set_xlabel("layer", fontsize=9)
    axis.set_xticks(np.arange(-0.5, depth), minor=True)
    axis.set_yticks(np.arange(-0.5, len(LAYOUTS)), minor=True)
    axis.grid(which="minor", color="white")
    axis.tick_params(which="minor", length=0)
    save(figure, "variants_layouts")


def draw(record: Path) -> None:
    records = [json.loads(line) for line in record.open()]
    seeds = sorted({r["seed"] for r in records})
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for r in records:
        losses.setdefault((r["kind"], r["layout"]), {})[r["seed"]] = r["loss"]
    runs = {(r["kind"], r["layout"]): r for r in records if r["seed"] == seeds[0]}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, layout, column in ((axes[0], "uniform", 0), (axes[1], "even", 1)):
        kinds = [k for k in PERPLEXITY if (k, layout) in runs and PERPLEXITY[k][column] is not None]
        theirs, ours = [PERPLEXITY[k][column] for k in kinds], [list(losses[k, layout].values()) for k in kinds]
        means = [float(np.mean(values)) for values in ours]
        spread = np.abs(np.array([[min(v), max(v)] for v in ours]).T - means)
        axis.errorbar(theirs, means, yerr=spread, fmt="o", color="#4c72b0", capsize=3)
        for k, x, y in zip(kinds, theirs, means, strict=True):
            offset = {"standard": (-42, -12), "fixed_seq_qk": (6, -9), "static_emb_qk": (6, -2), "rnd_emb_qk": (6, 5)}
            axis.annotate(k, (x, y), offset.get(k, (6, 3)), textcoords="offset points", fontsize=8)
        if layout == "uniform":
            axis.set_xscale("log")
        whole = [s for s in seeds if all(s in losses[k, layout] for k in kinds)]
        found = [spearman(theirs, [losses[k, layout][s] for k in kinds]) for s in whole]
        axis.set_title(f"{layout}: rank correlation {spearman(theirs, means):.2f}", fontsize=10)
        axis.set_xlabel("perplexity in the paper, 500M parameters")
        axis.margins(x=0.35, y=0.15)
        print(layout, f"{spearman(theirs, means):.2f}", {s: round(f, 2) for s, f in zip(whole, found, strict=True)})
        for kind, values in zip(kinds, ours, strict=True):
            print(f"  {kind}: {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)")
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
    draw_layouts()


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
