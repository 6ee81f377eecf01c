"""A style without a reference: collage diffusion, trained on Twemoji alone, draws in OpenMoji's lines.

Trains a style adapter (and as peer a LoRA of about as many weights) on drawings in the other style, whose captions say
nothing of style; then has prompts drawn and asks two linear probes on a vision transformer's features which style and
which object they see. Probes are trained on real drawings of both styles behind the autoencoder.

Run: python packages/eff-guidance/bench/pokefusion.py [--steps 200] [--only decoder,lora]
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from eff_embedded.collages import render
from eff_embedded.collages.sprites import sprite
from eff_embedded.diffusion import GROUNDS, OBJECTS, example, load_collage_diffusion
from eff_embedded.vision import load_vit, vit_pixels
from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention, condition_dropout
from eff_kernels.testing import environment, mean_interval
from PIL import Image

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pokefusion.jsonl"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "src" / "eff_guidance" / "pokefusion")
ADAPTER = HERE / "results" / "pokefusion_openmoji"
STYLES = ("twemoji", "openmoji")
LAYERS = (4, 9)  # of the vision transformer: lines and patches, and things
BATCH, SEED = 16, 0
MEASURED = ("openmoji", "object", "judge")


def restyled(layout, style, names=None):
    """The layout in another style (with other objects), each object in the middle of its square."""
    objects = []
    for placed, name in zip(layout.objects, names or [o.name for o in layout.objects], strict=True):
        (high, wide), (tall, broad) = (
            sprite(n, placed.size, style=s).mask.shape for n, s in ((placed.name, layout.style), (name, style))
        )
        x = min(max(placed.x + (wide - broad) // 2, 0), layout.size - broad)
        y = min(max(placed.y + (high - tall) // 2, 0), layout.size - tall)
        objects.append(dataclasses.replace(placed, name=name, x=x, y=y))
    return dataclasses.replace(layout, style=style, objects=tuple(objects))


def drawing(seed, style):
    """A collage in a style, float [3, 128, 128] from -1 to 1, and its caption."""
    made = example(seed)
    layout = restyled(made.collage.layout, style)
    picture = torch.from_numpy(np.asarray(render(layout).picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return picture, made.prompt


@torch.no_grad()
def encode(pipe, pictures):
    vae = pipe.vae
    latents = torch.cat([vae.encode(p).latent_dist.mode() for p in pictures.split(16)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(pipe, latents):
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return torch.cat([pipe.vae.decode(part).sample for part in latents.split(16)]).clamp(-1, 1)


class Eyes:
    """Mean features of two layers of the vision transformer, and linear probes on them."""

    def __init__(self):
        self.vit = load_vit()
        self.probes = {}

    @torch.no_grad()
    def see(self, pictures):
        found = []
        for part in pictures.split(16):
            states = self.vit(vit_pixels((part + 1) / 2, size=112), output_hidden_states=True).hidden_states
            found.append(torch.cat([states[layer][:, 1:].mean(1) for layer in LAYERS], -1))
        return torch.cat(found)

    def learn(self, name, features, labels, classes):
        self.middle, self.width = features.mean(0), features.std(0)
        torch.manual_seed(SEED)
        probe = torch.nn.Linear(features.shape[1], classes)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=0.1)
        x = (features - self.middle) / self.width
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(probe(x), labels).backward()
            optimizer.step()
        self.probes[name] = probe

    @torch.no_grad()
    def read(self, name, features):
        return self.probes[name]((features - self.middle) / self.width).argmax(-1)


def single(name, seed, style):
    """One object on a ground, as the probes' training data."""
    for i in range(1000):
        made = example(1_000_000 + 1000 * seed + i)
        if len(made.collage.layout.objects) == 1:
            break
    layout = restyled(made.collage.layout, style, [name])
    return torch.from_numpy(np.asarray(render(layout).picture).copy()).permute(2, 0, 1).float() / 127.5 - 1


def make_probes(pipe, each):
    eyes, pictures, labels = Eyes(), [], []
    for style in STYLES:
        for number, name in enumerate(OBJECTS):
            for i in range(each):
                pictures.append(single(name, 100 * i + number, style))
                labels.append((STYLES.index(style), number, i))
    seen = eyes.see(decode(pipe, encode(pipe, torch.stack(pictures))))
    labels = torch.tensor(labels)
    held = labels[:, 2] == each - 1
    ceiling = {}
    for name, column, classes in (("style", 0, 2), ("object", 1, len(OBJECTS))):
        eyes.learn(name, seen[~held], labels[~held, column], classes)
        right = eyes.read(name, seen[held]) == labels[held, column]
        ceiling[name] = [float(right[labels[held, 0] == s].float().mean()) for s in (0, 1)]
    return eyes, ceiling


def data(pipe, count):
    rows = [drawing(i, "openmoji") for i in range(count)]
    prompts = [pipe.encode(row[1]) for row in rows]
    text, pooled = (torch.cat([p[i] for p in prompts]) for i in (0, 1))
    return encode(pipe, torch.stack([r[0] for r in rows])), text, pooled


def batches(found, steps):
    """Samples, noise and levels of each step; the same for all that is trained."""
    draw = torch.Generator().manual_seed(SEED)
    latents, text, pooled = found
    for _ in range(steps):
        at = torch.randint(len(latents), (BATCH,), generator=draw)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=draw)
        u = torch.rand(BATCH, generator=draw)
        t = 1000 * 4 * u / (1 + 3 * u)  # the shift of the sampler
        drop = condition_dropout(BATCH, generator=draw)
        kept = (~drop.text)[:, None]
        yield latents[at], noise, t, text[at] * kept[..., None], pooled[at] * kept, ~drop.style


def train_style(pipe, found, steps, layers):
    torch.manual_seed(SEED)
    handle = add_style_attention(pipe, StyleAttentionConfig(layers=layers, gate_init=0.1))
    optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 20, (steps - i) / (0.3 * steps)))
    losses = []
    for latents, noise, t, text, pooled, keep in batches(found, steps):
        loss = handle.train_step(latents, noise, t, text, pooled_projections=pooled, keep=keep)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return handle, losses


def train_lora(pipe, found, steps, rank):
    """The usual way: PEFT's LoRA on all projections of attention, with the same batches and learning rates."""
    import peft

    torch.manual_seed(SEED)
    names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
    pipe.transformer.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    weights = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 20, (steps - i) / (0.3 * steps)))
    losses = []
    for latents, noise, t, text, pooled, _ in batches(found, steps):
        sigma = (t / 1000)[:, None, None, None]
        made = pipe.transformer(
            (1 - sigma) * latents + sigma * noise, timestep=t, encoder_hidden_states=text, pooled_projections=pooled,
        ).sample  # fmt: skip
        loss = F.mse_loss(made, noise - latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(p.numel() for p in weights), losses


def draw(pipe, prompts, seed):
    parts = range(0, len(prompts), 12)
    return 2 * torch.cat([
        pipe(prompts[i : i + 12], seed=seed + i, num_inference_steps=12, output_type="pt").images for i in parts
    ]) - 1  # fmt: skip


def sheet(rows, path, count=9):
    """The first pictures of each row, side by side."""
    lines = [torch.cat(list(pictures[:count]), 2) for pictures in rows]
    points = ((torch.cat(lines, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(points.numpy()).save(path, optimize=True)


def judge(eyes, pictures, numbers, prompts, judge_model):
    seen = eyes.see(pictures)
    style = (eyes.read("style", seen) == 1).float()
    thing = (eyes.read("object", seen) == torch.tensor(numbers)).float()
    judged = [OBJECTS[n] in r.names for n, r in zip(numbers, judge_model((pictures + 1) / 2), strict=True)]
    return {
        "openmoji": mean_interval(style),
        "object": mean_interval(thing),
        "judge": mean_interval(judged),
        "n": len(prompts),
    }


def table():
    """The page's table of the records."""
    lines = ["| | weights | training, CPU s | OpenMoji's style | object seen | object by the judge | CPU s a picture |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in map(json.loads, RESULTS.read_text().splitlines()):
        name = f"{row['what']}, strength {row['strength']:g}" if "strength" in row else row["what"]
        shares = [f"{100 * m:.0f} % ({100 * a:.0f} to {100 * b:.0f})" for m, a, b in (row[k] for k in MEASURED)]
        spent = row.get("train_cpu_seconds", "")
        lines.append(f"| {name} | {row.get('weights', '')} | {spent} | {' | '.join(shares)} | {row['seconds']} |")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=144)
    parser.add_argument("--only", default="decoder,lora")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--table", action="store_true", help="print the records and do nothing else")
    options = parser.parse_args()
    if options.table:
        table()
        return
    torch.set_num_threads(1)
    from eff_embedded.judge import load_judge

    pipe, judge_model = load_collage_diffusion(), load_judge()
    began = time.perf_counter()
    found = data(pipe, options.pictures)
    eyes, ceiling = make_probes(pipe, 3)
    print(f"data and probes {time.perf_counter() - began:.0f} s; held-out drawings {ceiling}", flush=True)
    numbers = list(range(len(OBJECTS)))
    grounds = list(GROUNDS)
    prompts = [f"a {OBJECTS[n]} on a {grounds[(7 * i) % len(grounds)]} background" for i, n in enumerate(numbers)]
    about = {
        **environment("cpu", SOURCES), "dtype": "float32", "steps": options.steps, "batch": BATCH,
        "pictures": options.pictures, "seed": SEED, "sampler_steps": 12, "held_out": ceiling,
    }  # fmt: skip

    def record(**row):
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, **about}) + "\n")
        print(row, flush=True)

    def timed(count=2):
        pipe(prompts[:1], seed=0, num_inference_steps=4)
        began = time.process_time()
        for i in range(count):
            pipe(prompts[:1], seed=i, num_inference_steps=12)
        return round((time.process_time() - began) / count, 3)

    plain = draw(pipe, prompts, 0)
    shown = [plain]
    record(what="plain", **judge(eyes, plain, numbers, prompts, judge_model), seconds=timed())
    for what in options.only.split(","):
        began = time.process_time()
        if what == "lora":
            weights, losses = train_lora(pipe, found, options.steps, 12)
            spent = time.process_time() - began
            pictures = draw(pipe, prompts, 0)
            record(
                what="lora", weights=weights, train_cpu_seconds=round(spent, 1), loss=float(np.mean(losses[-50:])),
                **judge(eyes, pictures, numbers, prompts, judge_model), seconds=timed(),
            )  # fmt: skip
            pipe.transformer.delete_adapters("default")
            continue
        handle, losses = train_style(pipe, found, options.steps, what)
        spent = time.process_time() - began
        if what == "decoder":
            handle.save_pretrained(ADAPTER)
        weights = sum(p.numel() for p in handle.parameters())
        for strength in (1.0, 0.5, 1.5) if what == "decoder" else (1.0,):
            with handle.use(strength=strength):
                pictures = draw(pipe, prompts, 0)
                shown.append(pictures)
                record(
                    what=what, strength=strength, weights=weights, train_cpu_seconds=round(spent, 1),
                    loss=float(np.mean(losses[-50:])), **judge(eyes, pictures, numbers, prompts, judge_model),
                    seconds=timed(),
                )  # fmt: skip
        handle.remove()
        if options.sheet:
            sheet(shown, options.sheet)


if __name__ == "__main__":
    main()
