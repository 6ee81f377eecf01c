"""Pointing at objects of collages with and without attention magnets; pictures of heat maps.

    uvx nox -s bench -- guidance refam

Every object of each collage is asked for by name ("the dog"). A point counts if it lies in the object's exact mask; the
mask that is compared is what is high around the point, without a segmenter. Intervals are 95 % by bootstrap over
collages, seeds of the noise taken together.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from eff_embedded.data import photograph
from eff_embedded.diffusion import example, load_collage_diffusion
from eff_guidance.refam import RefAMConfig, mean_iou, overlay, point_accuracy, refer
from eff_kernels.testing import environment, mean_interval
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "refam.jsonl"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "src" / "eff_guidance" / "refam")
BLOCKS = tuple(f"transformer_blocks.{i}" for i in range(8))
CASES = {
    "no magnets": {"magnets": ()},
    "magnets": {},
    "magnets, all blocks": {"blocks": BLOCKS},
    "joint softmax, no magnets": {"magnets": (), "normalize": "joint"},
    "joint softmax, magnets": {"normalize": "joint"},
    "words look at patches": {"direction": "text_to_image"},
    "name alone, no magnets": {"magnets": ()},
    "name alone, magnets": {},
}


def measure(pipe: Any, collages: int, seeds: int, case: str) -> dict[str, Any]:
    """Point accuracy and mean IoU of one way of reading the attention; "name alone" asks for "dog", not "the dog"."""
    points, masks, sinks, start = [], [], 0, time.perf_counter()
    for i in range(collages):
        collage = example(10_000 + i).collage
        hit, overlap = [], []
        for seed in range(seeds):
            for name, seen in zip(collage.names, torch.from_numpy(collage.visible), strict=True):
                phrase = name if case.startswith("name alone") else f"the {name}"
                found = refer(pipe, collage.tensor(), phrase, RefAMConfig(seed=seed, **CASES[case]))
                hit.append(point_accuracy([found.point_xy], [seen]))
                overlap.append(mean_iou([found.mask], [seen]))
                sinks += int(found.sinks.sum())
        points.append(np.mean(hit))
        masks.append(np.mean(overlap))
    return {
        "case": case, "collages": collages, "seeds": seeds, "point_accuracy": mean_interval(points),
        "mean_iou": mean_interval(masks), "sinks": sinks, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def draw(pipe: Any, path: Path) -> None:
    """Heat maps over four collages and a photograph, without magnets and with them."""
    rows = []
    pictures = [(example(10_000 + i).collage, None) for i in (2, 5, 8, 11)]
    given = [(c.tensor(), c.names[0]) for c, _ in pictures]
    cat = photograph("cat").crop((60, 0, 360, 300)).resize((128, 128), Image.Resampling.LANCZOS)
    given.append((torch.from_numpy(np.array(cat)).permute(2, 0, 1).float() / 255, "cat"))
    for tensor, name in given:
        tiles = [(tensor.permute(1, 2, 0) * 255).round().byte().numpy()]
        for case in ("no magnets", "magnets"):
            found = refer(pipe, tensor, f"the {name}", RefAMConfig(draws=4, **CASES[case]))
            tile = overlay(tensor, found.heatmap)
            x, y = found.point_xy
            tile[max(0, y - 4) : y + 5, max(0, x) : x + 1] = tile[y : y + 1, max(0, x - 4) : x + 5] = 255
            edge = found.mask.numpy()
            edge = edge ^ (
                edge & np.roll(edge, 1, 0) & np.roll(edge, -1, 0) & np.roll(edge, 1, 1) & np.roll(edge, -1, 1)
            )
            tile[edge] = (255, 255, 255)
            tiles.append(tile)
        rows.append(np.concatenate([np.pad(t, ((2, 2), (2, 2), (0, 0)), constant_values=255) for t in tiles], 0))
        print(name)
    picture = Image.fromarray(np.concatenate(rows, 1))
    picture.resize((picture.width * 3 // 2, picture.height * 3 // 2), Image.Resampling.LANCZOS).quantize(128).save(
        path, optimize=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--collages", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--only", choices=("measure", "draw"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = load_collage_diffusion()
    if args.only != "draw":
        for case in args.cases:
            record = {
                "method": "refam",
                **measure(pipe, args.collages, args.seeds, case),
                "dtype": "float32",
                **environment("cpu", SOURCES),
            }
            print(json.dumps(record))
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
    if args.only != "measure":
        draw(pipe, args.images / "refam.png")


if __name__ == "__main__":
    main()
