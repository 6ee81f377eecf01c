"""Two sprites that collage diffusion does not know, learnt from one picture with and without the attention losses.

    uvx nox -s bench -- guidance attencraft

Both runs train the same parameters with the same seeds, prompts, noise and steps; "plain" has neither the attention
loss nor masks in the denoising loss. A picture is compared with a sprite by the largest normalised correlation of
colours inside of the sprite's outline, over places in steps of 4 points and two sizes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from eff_embedded.collages import Ground, Layout, Placed, render
from eff_embedded.collages.sprites import sprite
from eff_embedded.diffusion import load_collage_diffusion
from eff_embedded.diffusion.prompts import LENGTH, pack
from eff_guidance.attencraft import AttenCraftConfig, AttenCraftTrainer, Concept, Reading, encode_latents
from eff_kernels.testing import environment, mean_interval
from PIL import Image
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "attencraft.jsonl"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "src" / "eff_guidance" / "attencraft")
NAMES = ("tiger", "balloon")
CONCEPTS = (Concept(token="<new1>", init_word="cat"), Concept(token="<new2>", init_word="ball"))
COMMON = {
    "template": "a {} on a white background", "learning_rate": 1e-3, "train": ("k", "v", "out"), "threshold": 0.05,
    "mask_time": (0.1, 0.2), "blocks": tuple(f"transformer_blocks.{i}.*" for i in range(2, 6)),
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "attencraft": {},
    "plain": {"attention_weight": 0.0, "background_weight": 1.0},
}


def reader_of_collages(pipe: Any) -> Any:
    """Prompts as `CollageDiffusionPipeline.encode` gives them, with gradients."""
    mean, std = (torch.tensor(pipe.config[key]) for key in ("prompt_mean", "prompt_std"))

    def read(prompt: str) -> Reading:
        ids = pipe.tokenizer(prompt).input_ids
        states = pipe.text_encoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        found = pack([states], mean, std)
        names = pipe.tokenizer.convert_ids_to_tokens(ids)
        arguments = {"encoder_hidden_states": found.tokens, "pooled_projections": found.pooled}
        return Reading(arguments, (*names, *[""] * (LENGTH - len(ids))))

    return read


def likeness(picture: Tensor, name: str) -> float:
    """Largest correlation of a picture [3, 128, 128] with a sprite on white, from -1 to 1."""
    best = -1.0
    for size in (48, 64):
        drawing = sprite(name, size)
        rgba = torch.from_numpy(drawing.rgba.astype(np.float32) / 255).permute(2, 0, 1)
        inside = torch.from_numpy(drawing.mask.copy())
        wanted = (rgba[:3] + (1 - rgba[3:]))[:, inside].flatten()
        wanted = (wanted - wanted.mean()) / (wanted - wanted.mean()).norm()
        high, wide = inside.shape
        tiles = F.unfold(picture[None], (high, wide), stride=4)[0].unflatten(0, (3, high * wide))
        seen = tiles[:, inside.flatten()].flatten(0, 1)
        seen = seen - seen.mean(0)
        best = max(best, float((wanted @ seen / seen.norm(dim=0).clamp(min=1e-6)).max()))
    return best


def run(arm: str, steps: int, seeds: int, training: int, pictures: dict[str, list[Any]]) -> dict[str, Any]:
    """Train one way and measure its pictures."""
    pipe = load_collage_diffusion()
    places = [Placed(name=n, x=64 * i, y=32, size=64) for i, n in enumerate(NAMES)]
    collage = render(Layout(size=128, ground=Ground(kind="plain", first=(240, 240, 240)), objects=tuple(places)))
    trainer = AttenCraftTrainer(
        pipe, encode_latents(pipe, collage.tensor()), CONCEPTS,
        AttenCraftConfig(steps=steps, seed=training, **COMMON, **ARMS[arm]),
        reader=reader_of_collages(pipe),
    )  # fmt: skip
    start = time.perf_counter()
    masks = trainer.find_masks()
    true = torch.stack([F.avg_pool2d(torch.from_numpy(v)[None].float(), 16)[0] for v in collage.visible]) > 0.4
    overlap = [float(((m > 0) & t).sum() / ((m > 0) | t).sum()) for m, t in zip(masks, true, strict=False)]
    reports = [trainer.step() for _ in range(steps)]
    seconds = time.perf_counter() - start
    prompts = {"first": "a <new1> on a white background", "second": "a <new2> on a white background",
               "both": "a <new1> and <new2> on a white background"}  # fmt: skip
    found: dict[str, list[list[float]]] = {}
    for which, prompt in prompts.items():
        made = pipe([prompt] * seeds, seed=0, output_type="pt").images
        pictures.setdefault(arm, []).extend(made)
        found[which] = [[likeness(one, name) for name in NAMES] for one in made]
    pictures["given"] = [collage.tensor()]
    return {
        "arm": arm, "sprites": list(NAMES), "steps": steps, "seeds": seeds, "training_seed": training,
        "seconds": round(seconds, 1),
        "mask_iou": [round(x, 3) for x in overlap],
        "last_losses": [
            round(float(np.mean([getattr(r, k) for r in reports[-20:]])), 4) for k in ("instance", "attention")
        ],
        "likeness": {k: [[round(x, 3) for x in row] for row in v] for k, v in found.items()},
        "own": mean_interval([v[i] for i, k in enumerate(("first", "second")) for v in found[k]]),
        "other": mean_interval([v[1 - i] for i, k in enumerate(("first", "second")) for v in found[k]]),
        "weaker_of_both": mean_interval([min(v) for v in found["both"]]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--training-seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pictures: dict[str, list[Any]] = {}
    for training, arm in [(s, a) for s in args.training_seeds for a in args.arms]:
        if arm == args.arms[0]:
            pictures.clear()
        record = {
            "method": "attencraft",
            **run(arm, args.steps, args.seeds, training, pictures),
            "dtype": "float32",
            **environment("cpu", SOURCES),
        }
        print(json.dumps(record), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if training == 0:
            rows = [pictures[a] for a in args.arms if a in pictures]
            draw(rows, pictures["given"][0], args.images / "attencraft.png")


def draw(rows: list[list[Tensor]], given: Tensor, path: Path) -> None:
    """The picture that was given, and a row of pictures of each way."""
    first = [given, *[torch.ones_like(given)] * (len(rows) - 1)]
    tiles = [[one, *row] for one, row in zip(first, rows, strict=True)]
    sheet = torch.cat([torch.cat([F.pad(p, (2, 2, 2, 2), value=1.0) for p in row], 2) for row in tiles], 1)
    array = (sheet.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    Image.fromarray(array).quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
