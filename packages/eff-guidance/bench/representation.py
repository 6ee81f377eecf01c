"""Do losses on hidden states help a small diffusion transformer? Plain, REPA, HASTE, dispersive loss and Repulsor.

    python packages/eff-guidance/bench/representation.py run [--seeds 5] [--minutes 20]
    python packages/eff-guidance/bench/representation.py time
    python packages/eff-guidance/bench/representation.py table

A DiT of diffusers' class (width 64, depth 4, 16 tokens) learns scikit-learn's digits, 8 x 8 points, by flow
matching. The teacher is eff-embedded's ViT-S/14, which has seen no digit's label: 56 x 56 points make 4 x 4 patches,
one for each token. Runs of one seed share weights, order of data, noise and noise levels. "run" adds what is not on
record, a line a run, and goes on where it was stopped. "time" trains all of them in turns, a step each, so that other
load on the machine meets all alike; what the teacher says is computed once before. "table" prints the page's tables.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from eff_guidance.alignment import (
    FixedStepTrigger,
    HolisticAlignment,
    HolisticAlignmentConfig,
    TeacherAdapter,
    TeacherTargets,
)
from eff_guidance.memory_bank import RepulsiveAlignment, RepulsorConfig, dispersive_loss, mean_cosine
from eff_guidance.training import gradient_cosine
from eff_kernels.edit import Handle
from eff_kernels.testing import environment

HERE = Path(__file__).parent
RECORD = HERE / "results" / "representation.jsonl"
SOURCES = (
    Path(__file__),
    *(Path(__file__).parents[1] / "src" / "eff_guidance" / part for part in ("alignment", "memory_bank", "training")),
)
TIMES = HERE / "results" / "representation_time.jsonl"
STEPS, BATCH, EVERY, TRAINED, STOP, BLOCK = 300, 48, 75, 1400, 150, 1
METHODS = ("plain", "REPA", "HASTE", "dispersive", "Repulsor")
NEVER = "HASTE, never stopped"  # one seed, for the angle of the gradients
ALIGN = HolisticAlignmentConfig(
    feature_layer=BLOCK, attention_pairs=((0, 8), (1, 9)), heads=3, teacher_dim=384, projector_dim=256
)
REPEL = RepulsorConfig(layer=BLOCK, dim=16, queue_size=TRAINED // 4, weight=0.05, with_ids=True)
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Data:
    """Digits from -1 to 1, labels, and what the teacher says about those for training."""

    def __init__(self) -> None:
        from eff_embedded.vision import load_vit
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        self.pictures = torch.tensor(digits.images[order] / 8 - 1, dtype=torch.float32)[:, None]
        self.labels = torch.tensor(digits.target[order])
        flat = self.pictures.flatten(1).numpy()
        self.judge = LogisticRegression(max_iter=2000, C=0.5).fit(flat[TRAINED:], self.labels[TRAINED:])
        centre = flat.mean(0)
        self.axes = (centre, np.linalg.svd(flat - centre, full_matrices=False)[2][:20].T)
        begin = time.process_time()
        teacher = TeacherAdapter(load_vit(), size=56, feature_layer=9)
        shown = (self.pictures[:TRAINED] / 2 + 0.5).expand(-1, 3, -1, -1)
        parts = [teacher(part, (8, 9)) for part in shown.split(200)]
        self.teacher_seconds = time.process_time() - begin
        self.features = torch.cat([p.features for p in parts])
        self.queries = [torch.cat([p.queries[i] for p in parts]) for i in (0, 1)]
        self.keys = [torch.cat([p.keys[i] for p in parts]) for i in (0, 1)]
        self.scales, self.grid = parts[0].scales, parts[0].grid

    def targets(self, places: torch.Tensor) -> TeacherTargets:
        queries, keys = (tuple(x[places] for x in both) for both in (self.queries, self.keys))
        return TeacherTargets(self.features[places], queries, keys, self.scales, self.grid)


def make_student(seed: int) -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=4, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def velocity(student: torch.nn.Module, noisy: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return student(noisy, timestep=t * 1000, class_labels=labels, return_dict=False)[0]


class Extra:
    """The loss that a method adds: `loss` after the student's forward pass, `step` after the update."""

    def __init__(self, method: str, student: torch.nn.Module, data: Data) -> None:
        self.method, self.data, self.module, self.handle, self.kept = method, data, None, Handle(), []
        if method in ("REPA", "HASTE", NEVER):
            config = ALIGN
            if method == "REPA":
                config = HolisticAlignmentConfig.from_dict({**ALIGN.to_dict(), "lambda_attention": 0.0})
            trigger = FixedStepTrigger(STOP) if method == "HASTE" else None
            self.module = HolisticAlignment(student, None, config, trigger=trigger)
        elif method == "Repulsor":
            self.module = RepulsiveAlignment(student, REPEL, dataset_size=TRAINED)
        elif method == "dispersive":
            self.handle.hook(student.transformer_blocks[BLOCK], lambda m, a, k, out: self.kept.append(out))

    def parameters(self) -> list[torch.Tensor]:
        return [] if self.module is None else list(self.module.parameters())

    def loss(self, places: torch.Tensor, step: int | None = None) -> torch.Tensor | float:
        if self.method == "dispersive":
            return 0.25 * dispersive_loss(self.kept.pop(), 0.5)
        if isinstance(self.module, RepulsiveAlignment):
            return self.module.loss(ids=places).total
        if isinstance(self.module, HolisticAlignment):
            if step is not None:
                self.module.update(step)
            return self.module.losses(targets=self.data.targets(places) if self.module.active else None).total
        return 0.0

    def step(self) -> None:
        if isinstance(self.module, RepulsiveAlignment):
            self.module.step()

    def pause(self) -> None:
        self.handle.remove()
        if self.module is not None:
            self.module.remove()


@torch.no_grad()
def judged(student: torch.nn.Module, data: Data) -> dict[str, float]:
    """Held-out loss, linear probe and mean cosine of the aligned block, and pictures that it makes."""
    from sklearn.linear_model import LogisticRegression

    student.eval()
    draw = torch.Generator().manual_seed(1234)
    clean, labels = data.pictures[TRAINED:], data.labels[TRAINED:]
    errors = []
    for level in LEVELS:
        noise = torch.randn(clean.shape, generator=draw)
        found = velocity(student, torch.lerp(clean, noise, level), torch.full((len(clean),), level), labels)
        errors.append((found - (noise - clean)).square().mean().item())
    kept: list[torch.Tensor] = []
    with Handle() as handle:
        handle.hook(student.transformer_blocks[BLOCK], lambda m, a, k, out: kept.append(out.mean(1)))
        # Index 10 is the label left out: the probe must not read the label that it is to find.
        noise = torch.randn(data.pictures.shape, generator=draw)
        none = torch.full((len(data.pictures),), 10)
        velocity(student, torch.lerp(data.pictures, noise, 0.2), torch.full((len(noise),), 0.2), none)
    states = kept[0]
    scaled = ((states - states.mean(0)) / states.std(0).clamp(min=1e-6)).numpy()
    probe = LogisticRegression(max_iter=100, C=0.1).fit(scaled[:TRAINED], data.labels[:TRAINED])
    wanted = torch.arange(200) % 10
    x, count = torch.randn(200, 1, 8, 8, generator=draw), 12
    for i in range(count):
        x = x - velocity(student, x, torch.full((200,), 1 - i / count), wanted) / count
    made = x.clamp(-1, 1).flatten(1).numpy()
    return {
        "loss": float(np.mean(errors)),
        "loss_low": errors[0],
        "loss_high": errors[-1],
        "probe": float(probe.score(scaled[TRAINED:], data.labels[TRAINED:])),
        "cosine": mean_cosine(states).item(),
        "accuracy": float(data.judge.score(made, wanted)),
        "frechet": frechet(made, data.pictures[TRAINED:].flatten(1).numpy(), data.axes),
    }


def frechet(a: np.ndarray, b: np.ndarray, axes: tuple[np.ndarray, np.ndarray]) -> float:
    """Frechet distance of two sets of pictures as normal distributions on 20 principal axes of the digits."""
    from scipy.linalg import sqrtm

    a, b = ((x - axes[0]) @ axes[1] for x in (a, b))
    mixed = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * mixed))


def angle(student: torch.nn.Module, extra: Extra, data: Data) -> float:
    """Cosine of the gradients of alignment and velocity on the aligned block, mean over four noise levels."""
    draw, found = torch.Generator().manual_seed(99), []
    places = torch.arange(256)
    clean = data.pictures[places]
    for t in (0.02, 0.1, 0.5, 0.8):
        noise = torch.randn(clean.shape, generator=draw)
        v = velocity(student, torch.lerp(clean, noise, t), torch.full((256,), t), data.labels[places])
        main = (v - (noise - clean)).square().mean()
        found.append(gradient_cosine(extra.loss(places), main, student.transformer_blocks[BLOCK].parameters()))
    return float(np.mean(found))


class Course:
    """One method's training, a step at a time."""

    def __init__(self, method: str, seed: int, data: Data) -> None:
        self.student, self.data = make_student(seed), data
        self.extra = Extra(method, self.student, data)
        torch.manual_seed(1000 + seed)  # dropped labels, the same for all methods
        self.draw = torch.Generator().manual_seed(seed)
        parameters = [*self.student.parameters(), *self.extra.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)

    def step(self, number: int) -> float:
        """Train once; returns the CPU seconds it took."""
        data, draw = self.data, self.draw
        places = torch.randint(TRAINED, (BATCH,), generator=draw)
        noise, t = torch.randn(BATCH, 1, 8, 8, generator=draw), torch.rand(BATCH, generator=draw)
        self.student.train()
        begin = time.process_time()
        clean = data.pictures[places]
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        loss = (velocity(self.student, noisy, t, data.labels[places]) - (noise - clean)).square().mean()
        loss = loss + self.extra.loss(places, number)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.extra.step()
        return time.process_time() - begin


def train(method: str, seed: int, data: Data) -> dict[str, object]:
    course, curve = Course(method, seed, data), []
    for step in range(STEPS):
        course.step(step)
        if (step + 1) % EVERY == 0:
            state = torch.get_rng_state()
            curve.append({"step": step + 1, **watched(course.student, course.extra, data, step)})
            torch.set_rng_state(state)
    course.extra.pause()
    return {"method": method, "seed": seed, "curve": curve}


def timed(rounds: int = 25) -> None:
    """Milliseconds of a step by method, in turns: the median of ratios to the plain step beside it."""
    torch.set_num_threads(1)
    data = Data()
    courses = {m: Course(m, 0, data) for m in METHODS}
    seconds = {m: [] for m in METHODS}
    for i in range(rounds):
        for method, course in courses.items():
            seconds[method].append(course.step(i))
    kept = {m: np.array(s[5:]) for m, s in seconds.items()}
    row = {
        "rounds": rounds - 5,
        "ms": {m: round(1e3 * float(np.median(s)), 2) for m, s in kept.items()},
        "ratio": {m: round(float(np.median(s / kept["plain"])), 3) for m, s in kept.items()},
        **where(data),
    }
    with TIMES.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row["ms"], row["ratio"])


def watched(student: torch.nn.Module, extra: Extra, data: Data, step: int) -> dict[str, float]:
    found = {}
    if extra.method == NEVER:
        student.eval()
        found["angle"] = round(angle(student, extra, data), 4)
    if step + 1 >= 0.5 * STEPS:  # what a method that takes up to twice as long has done in the time of plain training
        found |= {k: round(v, 5) for k, v in judged(student, data).items()}
    extra.kept.clear()
    return found


def where(data: Data) -> dict[str, object]:
    """What a record says about its making."""
    return {**environment("cpu", SOURCES), "dtype": "float32", "teacher_seconds": round(data.teacher_seconds, 1)}


def run(seeds: int, minutes: float) -> None:
    torch.set_num_threads(1)
    done = {(r["method"], r["seed"]) for r in rows()}
    jobs = [(m, s) for s in range(seeds) for m in (*METHODS, *([NEVER] if s == 0 else []))]
    jobs = [job for job in jobs if job not in done]
    if not jobs:
        return
    data, begin = Data(), time.process_time()
    RECORD.parent.mkdir(exist_ok=True)
    for method, seed in jobs:
        if time.process_time() - begin > 60 * minutes:
            print("out of time")
            return
        row = {**train(method, seed, data), **where(data)}
        with RECORD.open("a") as file:
            file.write(json.dumps(row) + "\n")
        last = row["curve"][-1]
        print(method, seed, {k: last[k] for k in ("loss", "probe", "accuracy", "frechet")}, flush=True)


def rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t."""
    from scipy.stats import t

    n = len(values)
    return float(np.mean(values)), float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else np.nan


def at_step(curve: list[dict[str, float]], step: float, name: str) -> float:
    """A metric after so many steps, between two evaluations on a straight line."""
    known = [p for p in curve if name in p]
    if step < known[0]["step"]:
        raise ValueError(f"{name} is first known after {known[0]['step']} steps, and was asked for after {step:.0f}")
    return float(np.interp(step, [p["step"] for p in known], [p[name] for p in known]))


def steps_in_time(method: str, ratio: float) -> float:
    """How many steps a method does in the time of the plain run; HASTE's cost as plain ones from `STOP` on."""
    if method == "HASTE":
        return STOP + (STEPS - STOP * ratio) if ratio * STOP < STEPS else STEPS / ratio
    return STEPS / ratio


def table() -> None:
    """Means over seeds, and differences to the plain run of the same seed with 95 % intervals."""
    everything = rows()
    seeds = sorted(set.intersection(*({r["seed"] for r in everything if r["method"] == m} for m in METHODS)))
    by = {(r["method"], r["seed"]): r["curve"] for r in everything}
    ratios = json.loads(TIMES.read_text().splitlines()[-1])["ratio"] if TIMES.exists() else {}
    names = {"loss": 4, "probe": 3, "cosine": 3, "accuracy": 3, "frechet": 3}
    print(f"{len(seeds)} seeds, {STEPS} steps; commits {sorted({r['commit'] for r in everything})}\n")
    for title in ("equal steps", *(["equal time"] if ratios else [])):
        print(f"| {title} | steps | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
        for method in METHODS:
            steps = STEPS if title == "equal steps" else min(STEPS, steps_in_time(method, ratios[method]))
            cells = []
            for name, digits in names.items():
                own = [at_step(by[method, s], steps, name) for s in seeds]
                gain = [x - by["plain", s][-1][name] for x, s in zip(own, seeds, strict=True)]
                text = f"{np.mean(own):.{digits}f}"
                if method != "plain" and len(seeds) > 1:
                    mean, half = interval(gain)
                    text += f" ({mean:+.{digits}f} +- {half:.{digits}f})"
                cells.append(text)
            print(f"| {method} | {steps:.0f} | " + " | ".join(cells) + " |")
        print()
    print("ratio of a step to a plain one:", ratios)
    print("cosine of the gradients by step:", *({p["step"]: p["angle"] for p in by[m, s]} for m, s in by if m == NEVER))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time", "table"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=20.0, help="CPU minutes after which no run is begun")
    given = parser.parse_args()
    {"run": lambda: run(given.seeds, given.minutes), "time": timed, "table": table}[given.what]()


if __name__ == "__main__":
    main()
