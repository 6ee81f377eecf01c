"""Draw results/vla.jsonl and results/vla_paths.json for the documentation, and print the table of its page.

python packages/eff-quant/bench/vla/draw.py
"""

from __future__ import annotations

import json
import math
import statistics

import matplotlib
from _task import RADIUS, REACHED
from _ways import WAYS
from vla import FLOAT, PATHS, RESULTS, ROOT

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "eff"
from matplotlib import pyplot as plt  # noqa: E402 - after the choice of the format
from matplotlib.ticker import FixedLocator, NullLocator  # noqa: E402

IMAGES = ROOT / "docs" / "images"
COLOURS = {"all layers": "#c44e52", "selective": "#8c8c8c", "QuantVLA": "#4c72b0"}
NAMES = {
    "W4A8": "W4A8",
    "W4A8 svd": "W4A8, svd",
    "W4A8 hadamard": "W4A8, hadamard",
    "W4A4 emulated, gain 8": "W4A4, outliers of 8",
    "W4A4 emulated": "W4A4, outliers of 20",
}


def outcomes(line: dict) -> list[int]:
    return [int(c) for c in "".join(line["episodes"])]


def wilson(line: dict) -> tuple[float, float]:
    """95 % interval of the rate of success."""
    n, p, z = len(outcomes(line)), line["success"], 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def paired(line: dict, other: dict) -> tuple[float, float]:
    """Difference of success on the same episodes and half its 95 % interval."""
    d = [a - b for a, b in zip(outcomes(line), outcomes(other), strict=True)]
    return statistics.mean(d), 1.96 * statistics.stdev(d) / math.sqrt(len(d))


def rate(line: dict) -> str:
    low, high = (100 * x for x in wilson(line))
    return f"{100 * line['success']:.1f} ({low:.1f} to {high:.1f})"


def table(lines: dict) -> str:
    first = lines[FLOAT, FLOAT]
    head = ("bits", "layers", "error of actions", "success, %", "over float32", "over selective", "bytes")
    rows = [head, ("---",) * len(head), ("float32", "", "", rate(first), "", "", "")]
    for line in (lines[bits, way] for bits in NAMES for way in WAYS):
        bits, way = line["bits"], line["way"]
        over = []
        for other in (first, lines[bits, "selective"]):
            difference, half = paired(line, other)
            over.append("" if other is line else f"{100 * difference:+.1f} +- {100 * half:.1f}")
        size = f"{line['bytes'] / 1e6:.2f} of {line['bytes_float32'] / 1e6:.2f} MB" if "bytes" in line else ""
        rows.append((NAMES[bits], way, f"{statistics.mean(line['errors']):.4f}", rate(line), *over, size))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(lines: dict) -> None:
    """Success with its interval and error of the actions, a group of three for each choice of bits."""
    shown = [bits for bits in NAMES if (bits, "QuantVLA") in lines]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    reference = lines[FLOAT, FLOAT]
    left.axhspan(*(100 * x for x in wilson(reference)), color="black", alpha=0.12, linewidth=0)
    left.axhline(100 * reference["success"], color="black", linewidth=1, label="float32")
    for i, bits in enumerate(shown):
        for k, way in enumerate(WAYS):
            line, x = lines[bits, way], i + 0.22 * (k - 1)
            low, high = wilson(line)
            share = line["success"]
            error = [[100 * max(0, share - low)], [100 * max(0, high - share)]]
            label = way if i == 0 else None
            left.errorbar(x, 100 * share, yerr=error, fmt="o", color=COLOURS[way], capsize=3, label=label)
            right.scatter([x] * len(line["errors"]), line["errors"], s=14, color=COLOURS[way], label=label)
            right.plot([x - 0.08, x + 0.08], [statistics.mean(line["errors"])] * 2, color=COLOURS[way])
    for axes in (left, right):
        axes.set_xticks(range(len(shown)), [NAMES[b].replace(", ", "\n") for b in shown], fontsize=8)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(f"successful episodes of {len(outcomes(reference))}, %")
    left.set_ylim(0, 104)
    left.legend(fontsize=8, loc="lower left", frameon=False, handletextpad=0.8)
    right.set_yscale("log")
    right.yaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.5, 1]))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(NullLocator())
    right.set_ylabel("relative error of actions")
    figure.savefig(IMAGES / "quantvla_closed_loop.svg", metadata={"Date": None})
    plt.close(figure)


def draw_paths(drawn: dict) -> None:
    """The same episodes for several settings: a row for each."""
    names = [FLOAT, "W4A8, QuantVLA", *(f"W4A4 emulated, {way}" for way in WAYS)]
    columns = len(drawn[FLOAT]["goal"])
    size = (1.5 * columns + 1.1, 1.5 * len(names) + 0.2)
    figure, grid = plt.subplots(len(names), columns, figsize=size, sharex=True, sharey=True, layout="constrained")
    for row, name in zip(grid, names, strict=True):
        entry = drawn[name]
        for axes, path, goal, obstacle in zip(row, entry["paths"], entry["goal"], entry["obstacle"], strict=True):
            touched = any(math.dist(p, obstacle) < RADIUS for p in path[1:])
            good = math.dist(path[-1], goal) < REACHED and not touched
            axes.add_patch(plt.Circle(obstacle, RADIUS, color="#bbbbbb", linewidth=0))
            axes.add_patch(plt.Circle(goal, REACHED, color="#55a868", linewidth=0))
            axes.plot(*zip(*path, strict=True), color="#4c72b0" if good else "#c44e52", linewidth=1.3)
            axes.plot(*path[0], "o", color="black", markersize=3)
            axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), xticks=[], yticks=[], aspect="equal")
        row[0].set_ylabel(
            name.replace(" emulated, ", ", outliers of 20\n").replace("W4A8, ", "W4A8\n"),
            rotation=0,
            ha="right",
            va="center",
        )
    figure.savefig(IMAGES / "quantvla_paths.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    read = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = {(line["bits"], line["way"]): line for line in read}
    print(table(lines))
    plot(lines)
    draw_paths(json.loads(PATHS.read_text()))


if __name__ == "__main__":
    main()
