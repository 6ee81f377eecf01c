"""LayerBind on collage diffusion: objects in their boxes and the right one in front, beside masks and words alone."""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from eff_embedded.collages.dice import Dice
from eff_embedded.collages.english import with_article
from eff_embedded.diffusion import GROUNDS, OBJECTS, load_collage_diffusion
from eff_embedded.judge import load_judge
from eff_guidance.layerbind import Grid, Layer, LayerBindConfig, Layout, apply_layerbind, regions_of
from eff_kernels.edit.attention import intercept_attention
from eff_kernels.testing import environment, mean_interval

SIDE, CELL = 128, 8
RESULTS = Path(__file__).parent / "results" / "layerbind.jsonl"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "src" / "eff_guidance" / "layerbind")
SPEED = RESULTS.with_name("layerbind_speed.jsonl")
# Eight blocks are too few for the paper's share of hard-binding ones; the first is the one that all models share.
CONFIG = LayerBindConfig(eta1=0.25, hard_blocks=(0,))
LONGER = LayerBindConfig(eta1=0.4, hard_blocks=(0,))
WORDS = {(-1, 0): "to the left of", (1, 0): "to the right of", (0, -1): "above", (0, 1): "below"}


@dataclass(frozen=True)
class Case:
    """A layout with two objects, the first in front."""

    kind: str
    layout: Layout
    names: tuple[str, str]
    ground: str
    seed: int

    @property
    def prompt(self) -> str:
        """What plain prompting can say of it."""
        one, two = (with_article(n) for n in self.names)
        if self.kind == "overlap":
            return f"{one} in front of {two} on a {self.ground} background"
        (a, b, *_), (c, d, *_) = (layer.box or () for layer in self.layout.layers)
        across, down = np.sign(a - c), np.sign(b - d)
        word = WORDS[(int(across), 0) if abs(a - c) >= abs(b - d) else (0, int(down))]
        return f"{one} {word} {two} on a {self.ground} background"


def cases(kind: str, count: int, seed: int) -> list[Case]:
    """Layouts whose boxes of 64 points lie apart, or overlap by a quarter to a half."""
    dice, found = Dice(seed, f"layerbind {kind}"), []
    while len(found) < count:
        names = tuple(dice.shuffled(OBJECTS)[:2])
        ground = dice.choice(tuple(GROUNDS))
        (a, b), (c, d) = ((16 * dice.between(0, 4), 16 * dice.between(0, 4)) for _ in range(2))
        wide, high = max(64 - abs(a - c), 0), max(64 - abs(b - d), 0)
        share = wide * high / 64**2
        if (share == 0) if kind == "apart" else (0.25 <= share <= 0.5):
            layers = tuple(
                Layer(prompt=f"{with_article(n)} on a {ground} background", box=(x, y, x + 64, y + 64))
                for n, (x, y) in zip(names, ((a, b), (c, d)), strict=True)
            )
            layout = Layout(layers=layers, background=f"a {ground} background", size=(SIDE, SIDE))
            found.append(Case(kind, layout, (names[0], names[1]), ground, len(found)))
    return found


def draw_plain(pipe: Any, case: Case, seed: int, count: int) -> list[Any]:
    """Words alone."""
    return list(pipe(case.prompt, seed=seed, num_images_per_prompt=count).images)


def draw_layers(pipe: Any, case: Case, seed: int, count: int, config: LayerBindConfig = CONFIG) -> list[Any]:
    """LayerBind."""
    with apply_layerbind(pipe, case.layout, config):
        return draw_plain(pipe, case, seed, count)


def draw_masked(pipe: Any, case: Case, seed: int, count: int) -> list[Any]:
    """Regional prompts by an attention mask, in all steps and blocks.

    A picture token sees all picture tokens, and of the text its region's (the front one's on an overlap), or the
    background's; a text sees itself and its region.
    """
    side = SIDE // 16
    owner = torch.zeros(side * side, dtype=torch.long)
    for i, region in enumerate(regions_of(case.layout, Grid(side, side))):
        owner[region.idx] = i + 1
    texts = [case.layout.background, *(layer.prompt for layer in reversed(case.layout.layers))]
    found = pipe.encode(texts)
    length = found.tokens.shape[1]
    picture, kind = side * side, torch.arange(3).repeat_interleave(length)
    keep = torch.zeros(picture + 3 * length, picture + 3 * length, dtype=torch.bool)
    keep[:picture, :picture] = True
    keep[:picture, picture:] = owner[:, None] == kind
    keep[picture:, :picture] = keep[:picture, picture:].T
    keep[picture:, picture:] = kind[:, None] == kind

    def rule(call: Any, attend: Any) -> Any:
        mask = keep.expand(2 * count, 1, -1, -1).clone()
        mask[:count] = True
        mask[:count, :, :, picture + length :] = False  # rows without prompt have one text of zeros
        return attend(call.replace(mask=mask))

    tokens = found.tokens.flatten(0, 1).expand(count, -1, -1)
    pooled = pipe.encode(case.prompt).pooled.expand(count, -1)
    empty = torch.zeros_like(tokens), torch.zeros_like(pooled)
    with intercept_attention(pipe.transformer, rule):
        return list(
            pipe(
                prompt_embeds=tokens,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=empty[0],
                negative_pooled_prompt_embeds=empty[1],
                seed=seed,
            ).images
        )


METHODS = {
    "words": draw_plain,
    "masks": draw_masked,
    "layerbind": draw_layers,
    "layerbind, eta1=0.4": functools.partial(draw_layers, config=LONGER),
}


def verdict(judge: Any, picture: Any, case: Case) -> dict[str, float]:
    """What is where on a picture."""
    (reading,) = judge(picture)
    scores = judge.scores([picture]).cells.softmax(1)[0]
    inside, found = [], []
    for name, layer in zip(case.names, case.layout.layers, strict=True):
        find = reading.find(name)
        x0, y0, x1, y1 = layer.box or (0, 0, 0, 0)
        found.append(find is not None)
        inside.append(find is not None and x0 <= find.centre[0] <= x1 and y0 <= find.centre[1] <= y1)
    (a, b, c, d), (e, f, g, h) = (layer.box or () for layer in case.layout.layers)
    left, top, right, bottom = (round(v) // CELL for v in (max(a, e), max(b, f), min(c, g), min(d, h)))
    front = False
    if case.kind == "overlap":
        one, two = (scores[judge.objects.index(n), top:bottom, left:right].mean() for n in case.names)
        front = bool(one > two)
    return {
        "found": sum(found) / 2, "inside": sum(inside) / 2, "both_inside": float(all(inside)),
        "order": float(all(inside) and front),
    }  # fmt: skip


def sheet(pipe: Any, path: str, layouts: int) -> None:
    """A picture: one row a layout with its boxes (red in front of blue), then each method's."""
    from PIL import Image, ImageDraw

    drawn = [c for pair in zip(cases("overlap", layouts, 1), cases("apart", layouts, 1), strict=True) for c in pair]
    drawn = drawn[:layouts]
    whole = Image.new("RGB", ((SIDE + 4) * (1 + len(METHODS)), (SIDE + 4) * layouts), "white")
    for row, case in enumerate(drawn):
        plan = Image.new("RGB", (SIDE, SIDE), "white")
        pen = ImageDraw.Draw(plan)
        for name, layer, colour in list(zip(case.names, case.layout.layers, ("#c03030", "#3050c0"), strict=True))[::-1]:
            x0, y0, x1, y1 = layer.box or (0, 0, 0, 0)
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill="white", outline=colour, width=2)
            pen.text((x0 + 5, y0 + 4), name, fill=colour)
        pictures = [plan, *(draw(pipe, case, 5, 1)[0] for draw in METHODS.values())]
        for column, picture in enumerate(pictures):
            whole.paste(picture, ((SIDE + 4) * column + 2, (SIDE + 4) * row + 2))
    whole.save(path, optimize=True)


def speed(pipe: Any, rounds: int = 5) -> None:
    """Processor seconds a picture of each method, in turns on one layout; the least of the rounds."""
    case, lines = cases("overlap", 1, 5)[0], []
    for count in (1, 4):
        times: dict[str, list[float]] = {m: [] for m in METHODS}
        for turn in range(rounds + 1):
            for method, draw in METHODS.items():
                before = time.process_time()
                draw(pipe, case, turn, count)
                times[method].append((time.process_time() - before) / count)
        least = {m: min(t[1:]) for m, t in times.items()}
        for method, seconds in least.items():
            line = {"op": "layerbind_speed", "method": method, "pictures": count, "steps": 20}
            line |= {"cpu_seconds": round(seconds, 4), "of_words": round(seconds / least["words"], 3)}
            lines.append(line | {"dtype": "float32"} | environment("cpu", SOURCES))
            print(json.dumps({k: lines[-1][k] for k in ("method", "pictures", "cpu_seconds", "of_words")}))
    SPEED.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Draw layout by layout with all methods until the time is over, and write one line a method and kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", type=int, default=12, help="of each kind, at most")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--first", type=int, default=1000, help="seed of the layouts")
    parser.add_argument("--sheet", help="draw a few examples to this PNG instead")
    parser.add_argument("--speed", action="store_true", help="measure the time of a picture instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.speed:
        speed(load_collage_diffusion())
        return
    if options.sheet:
        sheet(load_collage_diffusion(), options.sheet, 4)
        return
    pipe, judge = load_collage_diffusion(), load_judge()
    kinds = ("apart", "overlap")
    marks: dict[tuple[str, str], list[list[dict[str, float]]]] = {(k, m): [] for k in kinds for m in METHODS}
    times: dict[str, list[float]] = {m: [] for m in METHODS}
    start = time.monotonic()
    pairs = zip(*(cases(kind, options.layouts, options.first) for kind in kinds), strict=True)
    for case in (case for pair in pairs for case in pair):
        if time.monotonic() - start > 60 * options.minutes and len(marks["overlap", "words"]) == len(
            marks["apart", "words"]
        ):
            break
        for method, draw in METHODS.items():
            before = time.process_time()
            pictures = draw(pipe, case, 1000 * case.seed, options.seeds)
            times[method].append((time.process_time() - before) / options.seeds)
            marks[case.kind, method].append([verdict(judge, p, case) for p in pictures])
    lines = []
    for (kind, method), found in marks.items():
        # A layout's pictures are no layouts of their own: their mean is its one value.
        shares = {key: mean_interval([np.mean([m[key] for m in each]) for each in found]) for key in found[0][0]}
        line = {"op": "layerbind", "kind": kind, "method": method, "layouts": len(found), "seeds": options.seeds}
        line |= shares | {"cpu_seconds": round(float(np.median(times[method])), 3), "dtype": "float32"}
        lines.append(line | environment("cpu", SOURCES))
        print(json.dumps({k: lines[-1][k] for k in ("kind", "method", "found", "inside", "order", "cpu_seconds")}))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
