"""Lite3R's block attention beside the dense model at 2, 8 and 32 views: seconds and memory of a forward pass.

Run: python apps/eff-train/bench/lite3r_speed.py

Weights are random: neither side's time depends on them. Times are the least of two to four, in turns; memory is the
process's peak above what it held before the pass, each measured in a process of its own. The floor is what the
arithmetic left over allows (attention's two products are counted by the keys read).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from eff_kernels.testing import environment
from eff_train.recipes.lite3r.student import Config, apply_lite3r
from eff_vision.multiview import MultiViewConfig, MultiViewTransformer

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results" / "lite3r_speed.jsonl"
SOURCES = (
    HERE,
    HERE.parents[1] / "src" / "eff_train" / "recipes" / "lite3r",
    HERE.parents[3] / "packages" / "eff-attention" / "src" / "eff_attention" / "sparse_linear",
    HERE.parents[3] / "packages" / "eff-vision" / "src" / "eff_vision" / "multiview",
)
SIZES = {
    "1.0 M (the recipe's)": (MultiViewConfig(), 168),
    "ViT-S wide": (MultiViewConfig(dim=384, heads=6, depth=4, taps=(1, 3), patch_size=8), 168),
}
VIEWS, KEEP = (2, 8, 32), (0.1, 0.3)


def models(size: str) -> dict[str, torch.nn.Module]:
    """The dense model and its copies."""
    torch.manual_seed(0)
    dense = MultiViewTransformer(SIZES[size][0]).eval().requires_grad_(False)
    found = {"dense": dense}
    for keep in KEEP:
        found[f"{keep:.0%}"] = copy.deepcopy(dense)
        apply_lite3r(found[f"{keep:.0%}"], Config(selection="block", keep_ratio=keep, fp8=False, min_tokens=512))
    return found


def share_of_arithmetic(size: str, views: int, keep: float) -> float:
    """Arithmetic of the blocks with this share of the keys, of the dense one's."""
    config, side = SIZES[size]
    tokens = (side // config.patch_size) ** 2 + 1 + config.registers
    linear = 2 * 12 * config.dim**2 * views * tokens  # of one block

    def attention(count: int, pairs: float) -> float:
        return 4 * count * pairs * config.dim

    dense = 2 * linear + attention(views * tokens, tokens) + attention(views * tokens, views * tokens)
    less = 2 * linear + attention(views * tokens, tokens) + attention(views * tokens, keep * views * tokens)
    return less / dense


def memory(size: str, kind: str, views: int) -> None:
    """Print the megabytes that one pass adds to the peak of this process."""
    torch.set_num_threads(1)
    model, side = models(size)[kind], SIZES[size][1]
    with torch.no_grad():
        model(torch.rand(1, 3, side, side))
        images = torch.rand(views, 3, side, side)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        model(images)
    print((peak() - before) / 1e3)


def peak() -> int:
    """Kilobytes that this process held at most."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@torch.no_grad()
def main() -> None:
    """Measure all and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=3)
    if found := parser.parse_args().memory:
        memory(found[0], found[1], int(found[2]))
        return
    torch.set_num_threads(1)
    lines = []
    for size, (_, side) in SIZES.items():
        found = models(size)
        for views in VIEWS:
            images = torch.rand(views, 3, side, side)
            times: dict[str, list[float]] = {kind: [] for kind in found}
            for _ in range(2 if views == VIEWS[-1] else 4):
                for kind, model in found.items():
                    before = time.perf_counter()
                    model(images)
                    times[kind].append(time.perf_counter() - before)
            for kind, seconds in times.items():
                command = [sys.executable, __file__, "--memory", size, kind, str(views)]
                peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
                keep = 1.0 if kind == "dense" else float(kind.rstrip("%")) / 100
                line = {
                    "op": "lite3r_speed", "model": size, "views": views, "points": side, "keys": kind,
                    "seconds": round(min(seconds), 4), "speedup": round(min(times["dense"]) / min(seconds), 3),
                    "floor": round(1 / share_of_arithmetic(size, views, keep), 2), "peak_megabytes": round(peak, 1),
                    "dtype": "float32", "load": round(os.getloadavg()[0], 2), **environment("cpu", SOURCES),
                }  # fmt: skip
                lines.append(line)
                print({k: line[k] for k in ("model", "views", "keys", "seconds", "speedup", "floor", "peak_megabytes")})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
