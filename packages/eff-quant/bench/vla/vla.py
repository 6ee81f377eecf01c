"""QuantVLA on a small policy: error of the actions at equal noise and success in closed loop, for each way to quantise.

    python packages/eff-quant/bench/vla/vla.py [--bits W4A8]
    python packages/eff-quant/bench/vla/draw.py

W4A8 runs in integers. W4A4 is emulated (activations rounded to 4 bits in floating point), with outlier channels planted
in front of the quantised layers, to make drift visible. The float policy and every setting meet the same episodes, with
the same noise. Each setting appends a line to results/vla.jsonl; paths of a few episodes go to results/vla_paths.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch
from _policy import load
from _task import episodes
from _ways import GAINS, SETTINGS, WAYS, action_error, plant_outliers, quantised
from eff_kernels.testing.machine import device_name
from torch import Tensor, nn

ROOT = Path(__file__).parents[4]
RESULTS = Path(__file__).parent.parent / "results" / "vla.jsonl"
PATHS = RESULTS.with_name("vla_paths.json")
SOURCES = ("packages/eff-quant/bench/vla", "packages/eff-quant/src", "packages/eff-kernels/src")
FLOAT, FIRST_SEED, DRAWN = "float32", 100, 6


def environment() -> dict:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", *SOURCES)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@torch.no_grad()
def closed_loop(model: nn.Module, seed: int, count: int) -> tuple[str, Tensor, dict]:
    """Episodes of one seed: success as a string of 0 and 1, the paths, what the drawing needs of the scenes."""
    success, paths, scene = episodes(lambda o, noise: model(**o, noise=noise), count, FIRST_SEED + seed)
    shown = {"goal": scene.goal_position[:DRAWN].tolist(), "obstacle": scene.obstacle[:DRAWN].tolist()}
    return "".join("01"[int(s)] for s in success), paths[:DRAWN], shown


def measured(bits: str, way: str, seeds: int, count: int) -> tuple[dict, Tensor, dict]:
    """Everything about one setting, and paths of the first seed."""
    teacher, config = load(), SETTINGS.get(bits)
    line, errors, factors, outcomes, first = {"bits": bits, "way": way}, [], [], [], None
    start = time.monotonic()
    for seed in range(seeds):
        model = teacher
        if bits != FLOAT:
            source = plant_outliers(teacher, seed, gain=GAINS[bits]) if bits in GAINS else teacher
            model, table, report = quantised(source, way, seed, config)
            errors.append(round(action_error(source, model, seed), 5))
            if table is not None:
                factors += [round(f, 4) for m in table.modules.values() for f in (*m.alpha, m.beta)]
            if report is not None:
                line["layers"] = len(report.changed)
                line["bytes_float32"] = sum(e.bytes_before for e in report.changed)
                line["bytes"] = sum(e.bytes_after for e in report.changed)
        outcome, *drawn = closed_loop(model, seed, count)
        outcomes.append(outcome)
        first = first or drawn
    line["success"] = sum(map(int, "".join(outcomes))) / (seeds * count)
    line |= {"errors": errors, "episodes": outcomes}
    if factors:
        line |= {"factors": [min(factors), max(factors)], "ones": factors.count(1.0), "of": len(factors)}
    return line | {"seconds": round(time.monotonic() - start)} | environment(), *first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=50, help="of each seed")
    parser.add_argument("--bits", choices=[FLOAT, *SETTINGS], nargs="*", default=[FLOAT, *SETTINGS])
    args = parser.parse_args()
    drawn = {}
    for bits in args.bits:
        for way in [FLOAT] if bits == FLOAT else WAYS:
            line, paths, shown = measured(bits, way, args.seeds, args.episodes)
            print({k: v for k, v in line.items() if k in ("bits", "way", "success", "errors", "seconds")}, flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            name = FLOAT if bits == FLOAT else f"{bits}, {way}"
            drawn[name] = {"paths": [[[round(c, 3) for c in p] for p in path] for path in paths.tolist()]} | shown
    before = json.loads(PATHS.read_text()) if PATHS.exists() else {}
    PATHS.write_text(json.dumps(before | drawn) + "\n")


if __name__ == "__main__":
    main()
