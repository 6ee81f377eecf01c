"""Trains each token mixer, in all layers and in every second one, on bytes of texts in installed packages.

``python packages/eff-attention/bench/variants.py`` takes about a minute of one core for each of the thirteen models,
writes ``results/variants.jsonl`` and goes on where it was stopped; ``--draw`` makes the pictures from that file, and
``--maps --steps 150`` the one of the mixers' maps.
"""

import argparse
import importlib.metadata
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from eff_attention.variants import (
    KINDS,
    AttentionVariantConfig,
    attention_indicators,
    attention_maps,
    build_hybrid,
    parameter_report,
    skip_layers,
    variant_layers,
)
from rich.progress import track
from transformers import Qwen2Config, set_seed

HERE = Path(__file__).parent
RECORD = HERE / "results" / "variants.jsonl"
PACKAGES = ("torch", "numpy", "transformers", "hypothesis", "pytest", "rich", "networkx", "sympy")
LENGTH, BATCH, VALIDATION = 128, 16, 128
RUNS = [("standard", "uniform"), *((kind, layout) for kind in KINDS[1:] for layout in ("uniform", "even"))]


def text() -> bytes:
    """Documentation and licence texts of installed packages, one after the other."""
    parts = []
    for package in PACKAGES:
        for file in sorted(importlib.metadata.files(package) or [], key=str):
            name = str(file)
            if name.endswith((".md", ".rst", ".txt", "METADATA")) or "LICENSE" in name or "NOTICE" in name:
                path = Path(str(file.locate()))
                if path.exists() and path.stat().st_size < 400_000:
                    parts.append(path.read_bytes())
    return b"\n".join(dict.fromkeys(parts))


def batches(data: torch.Tensor, steps: int, seed: int) -> torch.Tensor:
    start = torch.randint(0, len(data) - LENGTH, (steps, BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return data[start + torch.arange(LENGTH)]


def split(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every twentieth block of ten sequences is held out."""
    blocks = data[: len(data) // (10 * LENGTH) * 10 * LENGTH].view(-1, 10 * LENGTH)
    held = torch.arange(len(blocks)) % 20 == 19
    return blocks[~held].flatten(), blocks[held].view(-1, LENGTH)[:VALIDATION]


def settings(kind: str, train: torch.Tensor) -> AttentionVariantConfig:
    fixed = tuple(train[:LENGTH].tolist()) if kind == "fixed_seq_qk" else None
    return AttentionVariantConfig(kind=kind, max_len=LENGTH, fixed_ids=fixed)


def evaluate(model: torch.nn.Module, batch: torch.Tensor) -> float:
    with torch.inference_mode():
        parts = batch.split(BATCH)
        return sum(model(input_ids=p, labels=p, use_cache=False).loss.item() for p in parts) / len(parts)


def trained(kind: str, layout: str, training: torch.Tensor, steps: int, seed: int) -> tuple:
    """A model, its losses on the way, and the seconds that it took."""
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = build_hybrid(config, settings(kind, training), layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1)
    warm = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    curve, start = [], time.thread_time()
    for step, batch in enumerate(track(batches(training, steps, seed), f"{kind} {layout}")):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            curve.append(round(loss.item(), 4))
    return model.eval(), curve, round(time.thread_time() - start, 1)


def maps(data: torch.Tensor, steps: int) -> dict[str, list[np.ndarray]]:
    """Of each uniform model after some training: the maps of its layers over 32 bytes, mean over the heads."""
    training, held_out = split(data)
    found = {}
    for kind in KINDS:
        model, *_ = trained(kind, "uniform", training, steps, 0)
        layers = attention_maps(model, input_ids=held_out[:1, :32])
        found[kind] = [layers[i][0].mean(0).numpy() if i in layers else np.eye(32) for i in range(1, 5)]
    return found


def train(kind: str, layout: str, data: torch.Tensor, steps: int, seed: int) -> dict:
    training, held_out = split(data)
    model, curve, seconds = trained(kind, layout, training, steps, seed)
    result = {
        "kind": kind, "layout": layout, "seed": seed, "steps": steps, "loss": evaluate(model, held_out),
        "seconds": seconds, "parameters": parameter_report(model)["total"], "curve": curve,
    }  # fmt: skip
    result["indicators"] = {
        i: asdict(v) for i, v in attention_indicators(attention_maps(model, input_ids=held_out[:8])).items()
    }
    if layout == "even":
        with skip_layers(model, variant_layers(model)):
            result["loss_skipped"] = evaluate(model, held_out)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=len(RUNS), help="stop after so many new runs")
    parser.add_argument("--draw", action="store_true", help="make the pictures, and nothing else")
    parser.add_argument("--maps", action="store_true", help="train briefly and draw the maps, and nothing else")
    options = parser.parse_args()
    if options.draw:
        from _draw_variants import draw

        draw(RECORD)
        return
    torch.set_num_threads(1)
    data = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    if options.maps:
        from _draw_variants import draw_maps

        draw_maps(maps(data, options.steps))
        return
    meta = {
        "bytes": len(data),
        "texts": [f"{p} {importlib.metadata.version(p)}" for p in PACKAGES],
        "torch": torch.__version__,
    }
    done = set()
    if RECORD.exists():
        done = {(r["kind"], r["layout"], r["seed"], r["steps"]) for r in map(json.loads, RECORD.open())}
    wanted = [r for r in RUNS if (*r, options.seed, options.steps) not in done]
    for kind, layout in wanted[: options.runs]:
        result = {**train(kind, layout, data, options.steps, options.seed), **meta}
        with RECORD.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{kind} {layout}: {result['loss']:.4f} nats a byte, {result['seconds']} s")


if __name__ == "__main__":
    main()
