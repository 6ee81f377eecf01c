"""Random-feature attention beside the models one would take instead, at equal samples.

    python packages/eff-attention/bench/random_features_peers.py sphere|digits|bytes [--seeds 3]

"sphere": three targets of 512 sets of 17 points. "digits": scikit-learn's digits as sets of 64 (row, column, intensity)
in random order. "bytes": a model of two layers over bytes whose attention is trained, frozen random (values trained),
or absent. Appends to ``results/random_features_peers.jsonl``. Times are of one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from eff_attention.random_features import (
    TARGETS,
    RandomFeatureAttention,
    RandomFeatureAttentionClassifier,
    RandomFeatureAttentionRegressor,
    RandomFeatureMLPRegressor,
    RFAKernelRidge,
    sample_sets,
)
from eff_kernels.testing.machine import device_name
from rich.progress import track
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import RBFSampler
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn
from variants import LENGTH, batches, split, text

RECORD = Path(__file__).parent / "results" / "random_features_peers.jsonl"
PENALTIES = np.logspace(-6, 2, 17)


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def pooled(x: np.ndarray) -> np.ndarray:
    """The query and the mean and mean square of the keys."""
    return np.concatenate([x[:, 0], x[:, 1:].mean(1), (x[:, 1:] ** 2).mean(1)], 1)


class Trained(nn.Module):
    """DeepSets, or one layer of attention, trained by Adam with early stopping on a fifth of the samples."""

    def __init__(self, kind: str, dim: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.kind = kind
        self.keys = nn.Sequential(
            nn.Linear(2 * dim if kind == "DeepSets" else dim, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.query = nn.Linear(dim, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, keys = x[:, :1], x[:, 1:]
        if self.kind == "DeepSets":
            return self.head(self.keys(torch.cat([keys, query.expand_as(keys)], -1)).mean(1))
        tokens = self.keys(keys)
        return self.head(self.attention(self.query(query), tokens, tokens, need_weights=False)[0][:, 0])

    def fit(self, x: np.ndarray, y: np.ndarray, epochs: int = 400) -> Trained:
        inputs = torch.from_numpy(x).float()
        classes = y.dtype.kind in "iu"
        targets = torch.from_numpy(y) if classes else torch.from_numpy((y - y.mean()) / y.std()).float()[:, None]
        self.offset, self.spread = (0.0, 1.0) if classes else (float(y.mean()), float(y.std()))
        loss = nn.CrossEntropyLoss() if classes else nn.MSELoss()
        held = len(x) // 5
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-3)
        best, kept, waited = float("inf"), None, 0
        for _ in range(epochs):
            for part in torch.randperm(len(x) - held).split(64):
                optimizer.zero_grad()
                loss(self(inputs[held:][part]), targets[held:][part]).backward()
                optimizer.step()
            with torch.no_grad():
                value = float(loss(self(inputs[:held]), targets[:held]))
            waited += 1
            if value < best:
                best, waited, kept = value, 0, {k: v.clone() for k, v in self.state_dict().items()}
            if waited > 40:
                break
        self.load_state_dict(kept)
        return self

    @torch.no_grad()
    def predict(self, x: np.ndarray) -> np.ndarray:
        out = self(torch.from_numpy(x).float()).double().numpy()
        return out.argmax(1) if out.shape[1] > 1 else out[:, 0] * self.spread + self.offset


def record(**row: object) -> None:
    row |= {"threads": torch.get_num_threads(), "device": device_name()}
    with RECORD.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


def sphere(seeds: int) -> None:
    rbf = {"kernelridge__alpha": [1e-4, 1e-2, 1.0], "kernelridge__gamma": [0.01, 0.1, 1.0]}
    for seed in track(range(seeds), "sphere"):
        models = {
            "RFA, 300 heads": lambda s=seed: RandomFeatureAttentionRegressor(300, random_state=s),
            "BRFA, 300 heads": lambda s=seed: RandomFeatureAttentionRegressor(
                300, weight_mean="identity", random_state=s
            ),
            "RFAKernelRidge": RFAKernelRidge,
            "RFMLP, 1500": lambda s=seed: RandomFeatureMLPRegressor(1500, random_state=s),
            "KernelRidge (RBF, flat)": lambda: GridSearchCV(
                make_pipeline(FunctionTransformer(flat), KernelRidge(kernel="rbf")), rbf, cv=3
            ),
            "RBFSampler + RidgeCV (flat)": lambda s=seed: make_pipeline(
                FunctionTransformer(flat), RBFSampler(gamma=0.1, n_components=1500, random_state=s), RidgeCV(PENALTIES)
            ),
            "MLPRegressor (flat)": lambda s=seed: make_pipeline(
                FunctionTransformer(flat),
                TransformedTargetRegressor(
                    MLPRegressor(hidden_layer_sizes=(64, 64), early_stopping=True, max_iter=500, random_state=s),
                    transformer=StandardScaler(),
                ),
            ),
            "RidgeCV (query, mean, mean square)": lambda: make_pipeline(
                FunctionTransformer(pooled), RidgeCV(PENALTIES)
            ),
            "DeepSets (trained)": lambda: Trained("DeepSets", 4, 1),
            "attention layer (trained)": lambda: Trained("attention", 4, 1),
        }
        random = np.random.RandomState(seed)
        train, test = sample_sets(512, 16, 4, random), sample_sets(2000, 16, 4, random)
        for target in ("mean <b,x>^2", "mean <x0,x>^2 <b,x>", "mean <x0,x>^3 <b,x>"):
            y, wanted = TARGETS[target](train), TARGETS[target](test)
            for name, make in models.items():
                torch.manual_seed(seed)
                start = time.perf_counter()
                model = make().fit(train, y)
                seconds = time.perf_counter() - start
                error = float(np.square(model.predict(test) - wanted).mean() / wanted.var())
                record(task="sphere", target=target, model=name, seed=seed, error=error, seconds=seconds)


def digits(seeds: int) -> None:
    pictures, labels = load_digits(return_X_y=True)
    rows, columns = np.divmod(np.arange(64), 8)
    place = np.stack([rows, columns], 1) / 3.5 - 1
    tokens = np.concatenate([np.broadcast_to(place, (len(pictures), 64, 2)), pictures[..., None] / 8 - 1], -1)
    for seed in track(range(seeds), "digits"):
        random = np.random.RandomState(seed)
        shuffled = np.stack([t[random.permutation(64)] for t in tokens])
        order = random.permutation(len(tokens))
        train, test = order[:1347], order[1347:]
        values = FunctionTransformer(lambda x: x[:, :, 2])
        queried = FunctionTransformer(lambda x: np.concatenate([np.zeros_like(x[:, :1]), x], 1))
        models = {
            "RFA, 1000 heads": (
                RandomFeatureAttentionClassifier(1000, query="constant", weight_std=2.0, random_state=seed),
                shuffled,
            ),
            "mean, second moments + RidgeClassifierCV": (
                make_pipeline(
                    FunctionTransformer(lambda x: flat(np.einsum("nid,nie->nde", x, x)) / 64),
                    *(StandardScaler(), RidgeClassifierCV(PENALTIES)),
                ),
                shuffled,
            ),
            "DeepSets (trained)": (Trained("DeepSets", 3, 10), shuffled),
            "attention layer (trained)": (Trained("attention", 3, 10), shuffled),
            "RidgeClassifierCV, shuffled": (make_pipeline(values, RidgeClassifierCV(PENALTIES)), shuffled),
            "MLPClassifier, shuffled": (
                make_pipeline(values, MLPClassifier(random_state=seed, max_iter=500)),
                shuffled,
            ),
            "RidgeClassifierCV, pixels in order": (make_pipeline(values, RidgeClassifierCV(PENALTIES)), tokens),
        }
        for name, (model, x) in models.items():
            torch.manual_seed(seed)
            x = queried.transform(x) if isinstance(model, Trained) else x
            start = time.perf_counter()
            model.fit(x[train], labels[train])
            seconds = time.perf_counter() - start
            accuracy = float((model.predict(x[test]) == labels[test]).mean())
            record(task="digits", model=name, seed=seed, accuracy=accuracy, seconds=seconds)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers over bytes; `mixers` says what mixes tokens in each."""

    def __init__(self, mixers: tuple[str, str], width: int = 64) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        make = {
            "trained": lambda i: Attention(width, 4),
            "frozen": lambda i: RandomFeatureAttention(
                width, 16, causal=True, scale=width**-0.5, activation="softmax", weight_std=4.0, rank=16, seed=i
            ),
            "frozen ReLU": lambda i: RandomFeatureAttention(width, 16, causal=True, scale=width**-0.5, rank=16, seed=i),
        }
        self.mixers = nn.ModuleList(make[m](i) if m != "none" else None for i, m in enumerate(mixers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(2)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x if mixer is None else x + mixer(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.norms[4](x) @ self.embed.weight.T / 8


def byte_models(seeds: int, steps: int = 1500) -> None:
    train, held = split(torch.frombuffer(bytearray(text()), dtype=torch.uint8).long())
    runs = [("trained", "trained"), ("frozen", "trained"), ("trained", "frozen"), ("frozen", "frozen")]
    runs += [("frozen ReLU", "frozen ReLU"), ("none", "none")]
    for seed in range(seeds):
        for mixers in runs:
            torch.manual_seed(seed)
            model = Model(mixers)
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
            start = time.perf_counter()
            for batch in track(batches(train, steps, seed), f"{mixers} {seed}"):
                optimizer.zero_grad()
                logits = model(batch[:, :-1])
                nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
                optimizer.step()
                schedule.step()
            seconds = time.perf_counter() - start
            with torch.no_grad():
                losses = [
                    nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
                    for x in held.split(16)
                ]
            bits = float(torch.stack(losses).mean()) / np.log(2)
            count = sum(p.numel() for p in model.mixers.parameters())
            record(
                task="bytes",
                model=" + ".join(mixers),
                seed=seed,
                bits=float(bits),
                mixer_parameters=count,
                seconds=seconds,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sphere", "digits", "bytes"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"sphere": sphere, "digits": digits, "bytes": byte_models}[arguments.task](arguments.seeds)
