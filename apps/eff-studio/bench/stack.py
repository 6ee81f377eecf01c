"""Memory and speed of eff-studio as methods are stacked: float32, int8, an adapter, a layout, guidance by heads.

Run: python apps/eff-studio/bench/stack.py [--rounds 5] [--steps 20] [--threads 1]

Every picture is drawn by the studio's engine, as for a user. A step is right if it changes the picture, and if taking
it back gives the picture of the step before bit for bit (of stored weights: if the picture is near that of float32).
"""

import argparse
import json
import time
from pathlib import Path

import eff_guidance
import eff_kernels
import eff_quant
import numpy as np
import peft
import torch
from eff_kernels import Handle
from eff_kernels.testing import environment, weight_bytes
from eff_quant import Int8Config, quantize_
from eff_studio.engine.draw import run_work
from eff_studio.engine.model import load_model
from eff_studio.work import Generate, Heads, LayerBox

RESULTS = Path(__file__).parent / "results" / "stack.jsonl"
SOURCES = (
    Path(__file__),
    Path(__file__).parents[1] / "src",
    *(Path(p.__file__).parent for p in (eff_kernels, eff_quant, eff_guidance)),
)
PROMPT = "a dog in front of a house on a blue background"
LAYOUT = {
    "layers": (LayerBox(prompt="a dog", box=(0.1, 0.4, 0.6, 0.9)), LayerBox(prompt="a house", box=(0.4, 0, 1, 0.6)))
}
HEADS = {"heads": Heads(weights=((3, 0, 0.5), (4, 1, 0.5)))}
ROUNDED = 4.0  # of 255: how far points may be from those of float32, on average


def adapter(transformer):
    """LoRA of rank 8 on queries and values, as one that has been trained has it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    adapted = peft.get_peft_model(transformer, config)
    for name, p in adapted.named_parameters():
        if ".lora_B." in name:
            p.data.mul_(0.1)
    handle = Handle()
    handle.on_remove(adapted.unload)
    return handle


def draw(model, steps, methods):
    """A picture, and its seconds."""
    work, begun = Generate(prompt=PROMPT, steps=steps, **methods), time.perf_counter()
    made = run_work(model, work, open_picture=None, report=lambda progress: None, cancelled=lambda: False)
    return np.asarray(made.images[0], np.int32), time.perf_counter() - begun


def main():
    """Stack, check, measure, write one line a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, about = load_model(), environment("cpu", SOURCES)
    transformer, before = model.pipe.transformer, None
    parts = [part for part in model.pipe.components.values() if isinstance(part, torch.nn.Module)]
    stack = [
        ("float32", lambda: None, {}),
        ("int8", lambda: quantize_(transformer, Int8Config()), {}),
        ("+ LoRA", lambda: adapter(transformer), {}),
        ("+ layout", lambda: None, LAYOUT),
        ("+ head guidance", lambda: None, {**LAYOUT, **HEADS}),
    ]
    lower = {}
    for name, apply, methods in stack:
        handle = apply()
        picture, _ = draw(model, options.steps, methods)  # the first one warms up
        ok = before is None or not np.array_equal(picture, before)
        if name == "int8":
            ok &= bool(np.abs(picture - before).mean() < ROUNDED)
        elif before is not None:
            if handle is not None:
                handle.remove()
            ok &= np.array_equal(draw(model, options.steps, lower)[0], before)
            if handle is not None:
                apply()
        times = sorted(draw(model, options.steps, methods)[1] for _ in range(options.rounds))
        record = {
            "op": "studio_stack", "step": name, "weights_mb": weight_bytes(*parts) / 1e6,
            "transformer_mb": weight_bytes(transformer) / 1e6,
            "picture_s": times[len(times) // 2], "picture_s_min": times[0], "picture_s_max": times[-1],
            "steps": options.steps, "rounds": options.rounds, "model": model.name, "dtype": "float32", "seed": 0,
            "checked": True, "ok": bool(ok), **about,
        }  # fmt: skip
        print({k: v for k, v in record.items() if k not in about}, flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        before, lower = picture, methods


if __name__ == "__main__":
    main()
