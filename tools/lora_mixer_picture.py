"""Draw right answers of LoRA mixtures on three tasks for README.md: ``uv run tools/lora_mixer_picture.py``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "apps" / "eff-train" / "bench" / "results" / "lora_mixer.jsonl"
PATH = ROOT / "docs" / "images" / "lora_mixer.svg"
TASKS = {"sum": "sums", "backwards": "words backwards", "kind": "kinds of things"}


def main() -> None:
    """Write the picture."""
    mpl.rcParams["svg.hashsalt"] = "lora_mixer"
    latest = {r["method"]: r for r in map(json.loads, RECORD.read_text().splitlines()) if r.get("seed") == 0}
    latest.pop("base", None)
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for place, (task, name) in enumerate(TASKS.items()):
        shares = [100 * r[f"{task}_right"] for r in latest.values()]
        axes.barh([row + 0.25 * (1 - place) for row in range(len(latest))], shares, height=0.24, label=name)
    axes.set_yticks(range(len(latest)), list(latest), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("right answers, % (SmolLM2-135M, 128 questions a task)", fontsize=8)
    axes.legend(fontsize=8, loc="lower right", ncols=3, bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PATH, metadata={"Date": None})


if __name__ == "__main__":
    main()
