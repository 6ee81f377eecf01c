"""Trains the small FLUX Fill that copies digits, and measures what shifting and gains of heads do to it.

Run: python packages/eff-guidance/bench/context_brush_digits.py [--train] [--steps 3000]
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch
from eff_guidance.context_brush import CanvasSpans, ContextBrushConfig, apply_incontext_brush
from eff_kernels.testing import environment, mean_interval

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "context_brush_digits.jsonl"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "src" / "eff_guidance" / "context_brush")
spec = importlib.util.spec_from_file_location("copy_digits", HERE.parent / "tests" / "context_brush" / "copy_digits.py")
copy_digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copy_digits)
SPANS = CanvasSpans(grid=(8, 4), subjects=((0, 0, 4, 4),), query=(4, 0, 8, 4))


def train(steps):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model = copy_digits.make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100, (steps - i) / (0.4 * steps))
    )
    shapes, classes = copy_digits.digits()
    same = [torch.nonzero(classes[:1500] == c)[:, 0] for c in range(10)]
    began, losses = time.process_time(), []
    for i in range(steps):
        at = torch.randint(1500, (48,), generator=draw)
        # The hole holds another writing of the same digit in the same colour; the prompt names it in half of the cases.
        other = torch.tensor([int(same[c][torch.randint(len(same[c]), (1,), generator=draw)]) for c in classes[at]])
        colours = copy_digits.random_colours(48, draw)
        demo, wanted = (copy_digits.paint(shapes[j], colours) for j in (at, other))
        text, pooled = copy_digits.prompts(classes[at], (torch.rand(48, generator=draw) < 0.5).float())
        clean = copy_digits.pack(torch.cat([demo, wanted], 2))
        noise = torch.randn(clean.shape, generator=draw)
        level = torch.rand(48, generator=draw)
        noisy = (1 - level[:, None, None]) * clean + level[:, None, None] * noise
        made = model(
            torch.cat([noisy, copy_digits.conditions(demo)], -1), encoder_hidden_states=text,
            pooled_projections=pooled, timestep=level, **copy_digits.places(),
        ).sample  # fmt: skip
        loss = (made - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if i % 250 == 249:
            print(i + 1, round(float(np.mean(losses[-250:])), 4), f"{time.process_time() - began:.0f} s", flush=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, copy_digits.WEIGHTS)


def measure(seeds, record):
    """Likeness to the demonstration without a prompt, and classes where prompt and demonstration disagree."""
    shapes, classes = copy_digits.digits()
    shapes, classes = shapes[1500:1660], classes[1500:1660]
    draw = torch.Generator().manual_seed(1)
    demo = copy_digits.paint(shapes, copy_digits.random_colours(len(shapes), draw))
    asked = (classes + 1 + torch.randint(9, (len(classes),), generator=draw)) % 10
    model = copy_digits.load_model()
    settings = [
        *({"shift_image": s, "shift_text": 0.0, "head_gain": 0.0} for s in (0.0, 0.3, 0.6)),
        *({"shift_image": 0.0, "shift_text": 0.0, "head_gain": g} for g in (0.2, 0.4)),
        {"shift_image": 0.0, "shift_text": 0.3, "head_gain": 0.0},
        {},
    ]
    base = None
    for setting in settings:
        config = ContextBrushConfig(**setting)
        alike, obeyed, copied = [], [], []
        with apply_incontext_brush(model, SPANS, config):
            for seed in seeds:
                free = copy_digits.fill(model, demo, *copy_digits.prompts(classes, torch.zeros(len(demo))), seed=seed)
                told = copy_digits.fill(model, demo, *copy_digits.prompts(asked, torch.ones(len(demo))), seed=seed)
                alike.append(copy_digits.likeness(free, demo))
                read = copy_digits.nearest_class(told)
                obeyed.append((read == asked).float())
                copied.append((read == classes).float())
        alike, obeyed, copied = (torch.stack(x).mean(0) for x in (alike, obeyed, copied))
        base = base or (alike, obeyed)
        record(
            **config.to_dict(), likeness=mean_interval(alike), likeness_gain=mean_interval(alike - base[0]),
            prompt=mean_interval(obeyed), prompt_gain=mean_interval(obeyed - base[1]),
            demonstration=mean_interval(copied), pictures=len(demo), seeds=list(seeds),
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        train(options.steps)
    about = {**environment("cpu", SOURCES), "dtype": "float32"}

    def record(**row):
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, **about}) + "\n")
        print({k: row[k] for k in ("shift_image", "shift_text", "head_gain", "likeness_gain", "prompt", "prompt_gain")})

    measure(range(1), record)


if __name__ == "__main__":
    main()
