"""Trains each token mixer, in all layers and in every second one, to copy and to recall.

``python packages/eff-attention/bench/copy_task.py`` takes about a minute of one core for each of thirteen models and of
three seeds, writes ``results/copy_task.jsonl`` and goes on where it was stopped.

Half of the sequences hold eight random tokens twice: the second time they follow from the first by position alone. The
other half hold four pairs of a key and a value, and then the keys in another order, each with its value: what to look
at depends on the tokens. The loss is that of the copies and of the values asked for.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from eff_attention.variants import KINDS, AttentionVariantConfig, build_hybrid, skip_layers, variant_layers
from transformers import Qwen2Config, set_seed

RECORD = Path(__file__).parent / "results" / "copy_task.jsonl"
HALF, VOCABULARY = 8, 16
RUNS = [("standard", "uniform"), *((kind, layout) for kind in KINDS[1:] for layout in ("uniform", "even"))]


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [count, 16], the first half of them to copy and the second to recall, and which tokens count (bool)."""
    once = torch.randint(VOCABULARY, (count // 2, HALF), generator=generator)
    number, pairs = count - count // 2, HALF // 2
    keys = torch.rand(number, HALF, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(HALF, VOCABULARY, (number, pairs), generator=generator)
    order = torch.rand(number, pairs, generator=generator).argsort(-1)
    parts = [torch.stack([keys, values], -1), torch.stack([keys.gather(1, order), values.gather(1, order)], -1)]
    tokens = torch.cat([torch.cat([once, once], 1), torch.cat([p.flatten(1) for p in parts], 1)])
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    counts[: count // 2, HALF:] = True
    counts[count // 2 :, HALF + 1 :: 2] = True
    return tokens, counts


def losses(model: torch.nn.Module, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Nats of the tokens that count, one of copies and one of values."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    nats = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    half = len(tokens) // 2
    return torch.stack([nats[s][counts[s, 1:]].mean() for s in (slice(half), slice(half, None))])


def train(kind, layout, steps, seed, width=96, batch=64, track=lambda steps, text: steps) -> dict:
    """Train one model; what it loses on new sequences, and what it loses without the layers of the variant."""
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2 * HALF, tie_word_embeddings=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    fixed = tuple(draw(2, generator)[0][0].tolist()) if kind == "fixed_seq_qk" else None
    variant = AttentionVariantConfig(
        kind=kind, max_len=2 * HALF, fixed_ids=fixed, qk_norm=kind == "non_approximate" and layout == "uniform"
    )
    model = build_hybrid(config, variant, layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (steps // 10), 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    start = time.thread_time()
    for _ in track(range(steps), f"{kind} {layout}, seed {seed}"):
        loss = losses(model, *draw(batch, generator)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    result = {"kind": kind, "layout": layout, "seed": seed, "steps": steps}
    result["seconds"] = round(time.thread_time() - start, 1)
    test = draw(512, torch.Generator().manual_seed(1000))
    model.eval()
    with torch.no_grad():
        result["copy"], result["recall"] = (round(x, 4) for x in losses(model, *test).tolist())
        if layout == "even":
            with skip_layers(model, variant_layers(model)):
                result["copy_skipped"], result["recall_skipped"] = (round(x, 4) for x in losses(model, *test).tolist())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    from rich.progress import track

    torch.set_num_threads(1)
    done = set()
    if RECORD.exists():
        done = {(r["kind"], r["layout"], r["seed"], r["steps"]) for r in map(json.loads, RECORD.open())}
    for seed in range(options.seeds):
        for kind, layout in RUNS:
            if (kind, layout, seed, options.steps) not in done:
                result = {**train(kind, layout, options.steps, seed, track=track), "torch": torch.__version__}
                with RECORD.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
