"""Puts a drawing into a hole of a collage, and asks the judge whether it is there.

Collage diffusion knows nothing of holes or demonstrations. The canvas is one picture of its size: the upper half shows
the drawing, the lower half the target. Counts what the judge finds in the result, how like the drawing the painted
place is, and the points outside of the hole that changed.

Run: python packages/eff-guidance/bench/context_brush.py [--cases 16] [--sheet PATH]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from eff_embedded.collages.dice import Dice
from eff_embedded.collages.sprites import sprite
from eff_embedded.diffusion import GROUNDS, OBJECTS, load_collage_diffusion
from eff_embedded.judge import load_judge
from eff_guidance.context_brush import ContextBrushConfig, incontext_insert
from eff_kernels.testing import environment, mean_interval
from PIL import Image

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "context_brush.jsonl"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "src" / "eff_guidance" / "context_brush")
HOLE = (64, 8, 120, 56)  # left, top, right, bottom on a target of 128 x 64
SETTINGS = {
    "canvas alone": {"shift_image": 0.0, "shift_text": 0.0, "head_gain": 0.0},
    "subject": {"shift_text": 0.0, "head_gain": 0.0},
    "text": {"shift_image": 0.0, "head_gain": 0.0},
    "heads": {"shift_image": 0.0, "shift_text": 0.0},
    "all": {},
}


def cut_out(name, size=48):
    """A drawing as RGBA with its own colours."""
    rgba = sprite(name, size).rgba.astype(float)
    alpha = rgba[..., 3:] / 255
    colours = np.where(alpha > 0, rgba[..., :3] / np.maximum(alpha, 1e-6), 0).clip(0, 255)
    return Image.fromarray(np.concatenate([colours, rgba[..., 3:]], -1).astype(np.uint8))


def case(number):
    """Subject, target with another object at the left, hole, prompt and names."""
    dice = Dice(0, f"context brush {number}")
    name, other = dice.shuffled(OBJECTS)[:2]
    ground = dice.choice(tuple(GROUNDS))
    target = Image.new("RGB", (128, 64), GROUNDS[ground])
    there = cut_out(other)
    target.paste(there, (32 - there.width // 2, 32 - there.height // 2), there)
    hole = np.zeros((64, 128), bool)
    hole[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = True
    prompt = f"a {name} to the right of a {other} on a {ground} background"
    return cut_out(name), target, hole, prompt, name, ground


def alike(painted, subject, ground):
    """Correlation of the best-placed drawing with the painted place, over points and colours."""
    place = np.asarray(painted, float)[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] - GROUNDS[ground]
    drawn = Image.new("RGB", subject.size, GROUNDS[ground])
    drawn.paste(subject, (0, 0), subject)
    drawn = np.asarray(drawn, float) - GROUNDS[ground]
    high, wide = drawn.shape[:2]
    best = -1.0
    for y in range(0, place.shape[0] - high + 1, 2):
        for x in range(0, place.shape[1] - wide + 1, 2):
            part = place[y : y + high, x : x + wide]
            best = max(best, (part * drawn).sum() / max(1e-6, np.linalg.norm(part) * np.linalg.norm(drawn)))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe, judge = load_collage_diffusion(), load_judge()
    about = {
        **environment("cpu", SOURCES), "dtype": "float32", "sampler_steps": 12, "seed": "number of the case",
        "cases": options.cases,
    }  # fmt: skip
    columns, base = [], None
    for what, setting in SETTINGS.items():
        found, like, changed, seconds, pictures = [], [], 0, [], []
        for number in range(options.cases):
            subject, target, hole, prompt, name, ground = case(number)
            began = time.process_time()
            image = incontext_insert(
                pipe, subject, target, hole, prompt, config=ContextBrushConfig(feather=0, **setting),
                canvas={"size": (64, 128), "background": GROUNDS[ground]}, num_inference_steps=12,
                generator=torch.Generator().manual_seed(number),
            )[0]  # fmt: skip
            seconds.append(time.process_time() - began)
            changed += int((np.asarray(image) != np.asarray(target))[~hole].any(-1).sum())
            # The judge reads squares: the target on a ground of its colour.
            square = Image.new("RGB", (128, 128), GROUNDS[ground])
            square.paste(image, (0, 32))
            reading = judge(square)[0].find(name)
            found.append(reading is not None and reading.centre[0] > 64)
            like.append(alike(image, subject, ground))
            pictures.append(image)
        base = base or (found, like)
        row = {
            "what": what, **ContextBrushConfig(feather=0, **setting).to_dict(), "found": mean_interval(found),
            "found_gain": mean_interval(np.subtract(found, base[0], dtype=float)), "likeness": mean_interval(like),
            "likeness_gain": mean_interval(np.subtract(like, base[1])), "points_changed_outside": changed,
            "seconds": round(float(np.median(seconds)), 3),
        }  # fmt: skip
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, **about}) + "\n")
        print(
            {k: row[k] for k in ("what", "found", "likeness", "likeness_gain", "points_changed_outside", "seconds")},
            flush=True,
        )
        columns.append(pictures)
    if options.sheet:
        rows = min(6, options.cases)
        made = Image.new("RGB", (128 * (len(columns) + 2) + 0, 64 * rows), "white")
        for i in range(rows):
            subject, target, hole, *_ = case(i)
            made.paste(subject, (40, 64 * i + 8), subject)
            holed = np.array(target)
            holed[hole] = 128
            made.paste(Image.fromarray(holed), (128, 64 * i))
            for j, pictures in enumerate(columns):
                made.paste(pictures[i], (128 * (j + 2), 64 * i))
        made.save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
