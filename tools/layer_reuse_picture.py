"""Draw docs/images/layer_reuse.svg from the records: what each method reads, and what that costs."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "apps/eff-serve/bench/results/layer_reuse_quality.jsonl"
IMAGE = ROOT / "docs/images/layer_reuse.svg"
PANELS = (
    ("bits_per_byte", "bits per byte of the text that follows"),
    ("bits_per_digit", "bits per digit of a planted number"),
    ("bits_per_copied_token", "bits per token of a passage again"),
)


def main() -> None:
    """Write the picture."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    pyplot.rcParams.update({"svg.hashsalt": "eff", "font.size": 9})
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for axis, (field, title) in zip(axes, PANELS, strict=True):
        for i, row in enumerate(rows):
            label = row["method"] + ("" if row["method"] == "dense" else f", {row['top_k']} keys")
            axis.plot(row["kv_bytes_per_token"] / 1e6, row[field], "o", color=f"C{i}", label=label)
        axis.axhline(rows[0][field], color="0.7", linewidth=0.8, zorder=0)
        axis.set(title=title, xlabel="MB of keys and values read per token", xlim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(IMAGE, metadata={"Date": None})


if __name__ == "__main__":
    main()
