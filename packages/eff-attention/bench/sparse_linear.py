"""Sparse-linear attention: time against dense attention, and quality on a small model of photographs.

    uvx nox -s bench -- attention sparse_linear [speed|model|quality|plot|levels] [--threads 1]

"speed" times a whole call, block map and both branches and the projection, next to dense SDPA; "model" a whole vision
transformer. "quality" trains a small encoder of two views (32 x 32 crops of scikit-learn's two photographs, 512 tokens)
to tell how far the second view is shifted and how bright its surroundings are. It then makes the attention sparse and
reports the relative L1 distance of all layers' outputs to the dense model: as it is, with the projection fitted in
closed form, and after 200 steps of distillation. "levels" does the same with the keys of each query one by one
(selection="token", as Lite3R trains) and runs what was distilled so by blocks, and times both.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import eff_attention
import torch
import torch.nn.functional as F
from eff_attention.sparse_linear import (
    AttentionDistiller,
    SLAConfig,
    SparseLinearAttention,
    apply_sla,
    calibrate_sla,
    freeze_backbone,
    sla_modules,
    sla_parameters,
    tile_order,
)
from eff_kernels import block_map, sparse_linear_attention
from eff_kernels.testing import Provider, Recorder, same
from rich.progress import track
from torch import nn

RESULTS = Path(__file__).parent / "results"
SOURCES = Path(eff_attention.__file__).parent / "sparse_linear"
SHARES = (0.05, 0.1, 0.2, 0.4)


def gradients(run, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(run(*leaves).float().square().sum(), leaves)


def exact(run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What the first head should give, in float64 and by references, with the blocks that the call itself chooses."""
    wide = [t[:, :1].double() for t in (q, k, v)]
    if not isinstance(run, SparseLinearAttention):
        return F.scaled_dot_product_attention(*wide)
    c = run.config
    if c.selection == "token":
        sparse, linear, _ = run.branches(*wide)
    else:
        blocks = block_map(
            q[:, :1], k[:, :1], k_high=c.k_high, k_low=c.k_low, block_q=c.block_q, block_k=c.block_k,
            smooth_k=c.smooth_k, protect=c.protect,
        )  # fmt: skip
        sparse, linear, _ = sparse_linear_attention(
            *wide, blocks, feature_map=c.feature_map, linear_scope=c.linear_scope, backend="reference"
        )
    return sparse + F.linear(linear, run.proj.weight.double(), run.proj.bias.double())


def right(run, qkv: tuple[torch.Tensor, ...], bound: float) -> bool:
    return same(run(*qkv)[:, :1], exact(run, *qkv), tolerance=bound)


def forwards(runs: dict, qkv: tuple[torch.Tensor, ...], bound: float) -> list[Provider]:
    return [
        Provider(name, lambda i, run=run: run(*qkv), check=lambda run=run: right(run, qkv, bound))
        for name, run in runs.items()
    ]


def right_gradients(run, leaves: list[torch.Tensor], bound: float) -> bool:
    first = [t.detach()[:, :1].requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(exact(run, *first).square().sum(), first)
    return same([g[:, :1] for g in gradients(run, leaves)], wanted, tolerance=bound)


def speed(lengths: list[int], rounds: int, path: Path | None) -> None:
    recorder = Recorder("sparse_linear", path, sources=[Path(__file__), SOURCES])
    for n in lengths:
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = torch.randn(3, 1, 8, n, 64, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
            runs = {"dense SDPA": F.scaled_dot_product_attention}
            for share in SHARES:
                attention = SparseLinearAttention(64, SLAConfig(k_high=share))
                nn.init.normal_(attention.proj.weight, std=0.01)
                runs[f"critical {share:.0%}"] = attention
            bound = 1e-4 if dtype == torch.float32 else 2e-2
            with torch.no_grad():
                name = f"{n} tokens, 8x64 {'fp32' if dtype == torch.float32 else 'bf16'}"
                recorder.run(name, forwards(runs, (q, k, v), bound), mode="forward", rounds=rounds)
            if n > 4096:
                continue
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            both = [
                Provider(
                    label,
                    lambda i, run=run, leaves=leaves: gradients(run, leaves),
                    check=lambda run=run, leaves=leaves, bound=bound: right_gradients(run, leaves, 2 * bound),
                )
                for label, run in runs.items()
            ]
            recorder.run(name, both, mode="forward + backward", rounds=rounds)
    print(recorder.table("dense SDPA"))


def whole_model(threads: int, rounds: int, path: Path | None) -> None:
    """A ViT-S/16 on a picture of 1024 x 1024 pixels, 4096 patches, with random weights."""
    from transformers import ViTConfig, ViTModel

    recorder = Recorder("sparse_linear_model", path, sources=[Path(__file__), SOURCES])
    settings = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 1024}
    torch.manual_seed(0)
    dense = ViTModel(ViTConfig(num_hidden_layers=12, patch_size=16, **settings)).eval()
    picture = torch.randn(1, 3, 1024, 1024)
    for dtype in (torch.float32, torch.bfloat16):
        models = {"dense": copy.deepcopy(dense).to(dtype)}
        for share in (0.05, 0.1, 0.2):
            models[f"critical {share:.0%}"] = copy.deepcopy(dense).to(dtype)
            apply_sla(models[f"critical {share:.0%}"], SLAConfig(k_high=share))
            for module in sla_parameters(models[f"critical {share:.0%}"]):
                nn.init.normal_(module, std=0.01)
        x = picture.to(dtype)
        bound = 1e-3 if dtype == torch.float32 else 5e-2
        with torch.no_grad():
            wanted = dense(picture).last_hidden_state if dtype == torch.bfloat16 else None
        providers = [
            Provider(
                name,
                lambda i, m=m, x=x: m(x).last_hidden_state,
                check=lambda m=m, x=x, wanted=wanted, bound=bound: right_model(m, x, wanted, bound),
            )
            for name, m in models.items()
        ]
        with torch.no_grad():
            name = f"ViT-S/16, 4096 patches {'fp32' if dtype == torch.float32 else 'bf16'}"
            recorder.run(name, providers, mode="forward", rounds=rounds)
    print(recorder.table("dense"))


def right_model(model: nn.Module, x: torch.Tensor, wanted: torch.Tensor | None, bound: float) -> bool:
    """Whether the attention of the first layer is right where it is sparse, and the whole model where it is dense."""
    sparse = [module for _, module in sla_modules(model)]
    if not sparse:
        if wanted is None:
            wanted = copy.deepcopy(model).double().eval()(x.double()).last_hidden_state
        return same(model(x).last_hidden_state, wanted, tolerance=bound)
    seen = []
    hook = sparse[0].register_forward_hook(lambda module, args, output: seen.append((args[:3], output)))
    model(x)
    hook.remove()
    qkv, output = seen[0]
    return same(output[:, :1], exact(sparse[0], *qkv), tolerance=bound)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Two views of 16 x 16 patches, 512 tokens, ordered in tiles of 4 x 4 patches."""

    def __init__(self, dim: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(12, dim), nn.Parameter(torch.randn(512, dim) * 0.02)
        self.attention = nn.ModuleList(Attention(dim, 4) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(layers)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.shift, self.smooth = nn.Linear(dim, 2), nn.Linear(dim, 3)
        one = tile_order((16, 16), (4, 4))[0]
        self.register_buffer("order", torch.cat([one, one + 256]))

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        patches = F.unfold(views.flatten(0, 1), 2, stride=2).mT.unflatten(0, (-1, 2)).flatten(1, 2)
        x, hidden = (self.embed(patches) + self.place)[:, self.order], []
        for attention, mlp, norm in zip(self.attention, self.mlp, self.norm, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
            hidden.append(x)
        return self.shift(x.mean(1)), self.smooth(x), hidden


def photographs() -> list[torch.Tensor]:
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(i.copy()).permute(2, 0, 1).float() / 127.5 - 1 for i in load_sample_images().images]


def draw(photos: list[torch.Tensor], generator: torch.Generator, batch: int = 8) -> tuple[torch.Tensor, ...]:
    """Views [B, 2, 3, 32, 32], the shift between them, and the brightness around each patch in the order of tokens."""
    views, shifts = [], []
    for _ in range(batch):
        photo = photos[int(torch.randint(len(photos), (), generator=generator))]
        y, x = (int(torch.randint(8, s - 40, (), generator=generator)) for s in photo.shape[1:])
        shift = torch.randint(-8, 9, (2,), generator=generator)
        dy, dx = shift.tolist()
        views.append(
            torch.stack([photo[:, y : y + 32, x : x + 32], photo[:, y + dy : y + dy + 32, x + dx : x + dx + 32]])
        )
        shifts.append(shift / 8)
    views = torch.stack(views)
    smooth = (
        F.avg_pool2d(F.avg_pool2d(views.flatten(0, 1), 2), 9, 1, 4).flatten(2).mT.unflatten(0, (-1, 2)).flatten(1, 2)
    )
    return views, torch.stack(shifts), smooth


def train(model: Encoder, photos: list[torch.Tensor], steps: int) -> float:
    generator, loss = torch.Generator().manual_seed(1), torch.zeros(())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    for _ in track(range(steps), "training the dense encoder"):
        views, shifts, smooth = draw(photos, generator)
        shift, low, _ = model(views)
        loss = F.mse_loss(shift, shifts) + F.mse_loss(low, smooth[:, model.order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@torch.no_grad()
def distance(student: Encoder, dense: Encoder, data: list[tuple[torch.Tensor, ...]]) -> tuple[float, float]:
    """Relative L1 of the outputs of all layers to the dense model, and the loss of the task."""
    off = size = loss = 0.0
    for views, shifts, smooth in data:
        shift, low, hidden = student(views)
        wanted = dense(views)[2]
        off += sum((a - b).abs().sum().item() for a, b in zip(hidden, wanted, strict=True))
        size += sum(b.abs().sum().item() for b in wanted)
        loss += (F.mse_loss(shift, shifts) + F.mse_loss(low, smooth[:, student.order])).item() / len(data)
    return off / size, loss


def distil(student: Encoder, dense: Encoder, photos: list[torch.Tensor], steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    handle = freeze_backbone(student)
    optimizer = torch.optim.AdamW(sla_parameters(student), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    with AttentionDistiller(student, dense, weight=lambda progress: 1.0) as distiller:
        for _ in track(range(steps), "distilling"):
            views, *_ = draw(photos, generator)
            with torch.no_grad():
                dense(views)
            student(views)
            loss = distiller.loss()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(sla_parameters(student)), 1.0)
            optimizer.step()
    handle.remove()


def dense_encoder(steps: int) -> tuple[Encoder, list[torch.Tensor], float, list[tuple[torch.Tensor, ...]]]:
    """The trained model, its photographs, the loss it ended with, and batches to test on."""
    torch.manual_seed(0)
    photos, dense = photographs(), Encoder()
    trained = train(dense, photos, steps)
    generator = torch.Generator().manual_seed(90)
    return dense.eval(), photos, trained, [draw(photos, generator) for _ in range(8)]


def quality(path: Path, steps: int) -> None:
    dense, photos, trained, test = dense_encoder(steps)
    fit_generator = torch.Generator().manual_seed(91)
    fit = [draw(photos, fit_generator) for _ in range(8)]
    rows = [{"k_high": 1.0, "way": "dense", "l1": 0.0, "loss": distance(dense, dense, test)[1], "trained": trained}]
    for scope in ("marginal", "noncritical"):
        for share in (0.1, 0.2, 0.3):
            config = SLAConfig(
                k_high=share, k_low=0.1 if scope == "marginal" else 0.0, block_q=16, block_k=16, linear_scope=scope
            )
            for way in ("sparse", "fitted", "distilled", "fitted, distilled"):
                student = copy.deepcopy(dense)
                apply_sla(student, config)
                if "fitted" in way:
                    calibrate_sla(student, [d[0] for d in fit])
                if "distilled" in way:
                    distil(student, dense, photos, 200)
                l1, loss = distance(student, dense, test)
                rows.append({"k_high": share, "scope": scope, "way": way, "l1": l1, "loss": loss})
                print(rows[-1])
            assert len(list(sla_modules(student))) == 4
    path.write_text(json.dumps({"steps": steps, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def levels(path: Path, steps: int) -> None:
    """Distilled at the level of tokens or of blocks, run at either; and the time of both on 8 heads of 64."""
    dense, photos, _, test = dense_encoder(steps)
    shared = {"k_low": 0.0, "feature_map": "elu", "linear_scope": "all"}
    rows = []
    for share in (0.1, 0.3):
        ways = {
            "token": SLAConfig(selection="token", k_high=share, **shared),
            "block": SLAConfig(k_high=share, block_q=16, block_k=16, **shared),
        }
        for trained_as in (None, *ways):
            student = copy.deepcopy(dense)
            apply_sla(student, ways[trained_as or "token"])
            if trained_as:
                distil(student, dense, photos, 200)
            for run_as, config in ways.items():
                for _, module in sla_modules(student):
                    module.config = config
                l1, loss = distance(student, dense, test)
                rows.append({"k_high": share, "distilled": trained_as, "run": run_as, "l1": l1, "loss": loss})
                print(rows[-1])
    path.write_text(json.dumps({"steps": steps, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def level_speed(rounds: int, path: Path | None) -> None:
    recorder = Recorder("sparse_linear_levels", path, sources=[Path(__file__), SOURCES])
    bound = 1e-3  # of 4096 queries one may choose another key than in float64, where two scores are nearly equal
    for n in (1024, 4096):
        q, k, v = torch.randn(3, 1, 8, n, 64, generator=torch.Generator().manual_seed(0)).unbind()
        runs = {"dense SDPA": F.scaled_dot_product_attention}
        for way in ("token", "block"):
            config = SLAConfig(selection=way, k_high=0.3, k_low=0.0, feature_map="elu", linear_scope="all")
            runs[f"{way}, 30%"] = SparseLinearAttention(64, config)
        with torch.no_grad():
            recorder.run(f"{n} tokens, 8x64 fp32", forwards(runs, (q, k, v), bound), mode="forward", rounds=rounds)
    print(recorder.table("dense SDPA"))


def plot(path: Path, picture: Path) -> None:
    import matplotlib.pyplot as plt

    rows = json.loads(path.read_text())["rows"][1:]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, scope in zip(axes, ("marginal", "noncritical"), strict=True):
        for way, style in zip(
            ("sparse", "fitted", "distilled", "fitted, distilled"), ("o-", "s-", "^-", "d-"), strict=True
        ):
            chosen = [r for r in rows if r["scope"] == scope and r["way"] == way]
            axis.plot([100 * r["k_high"] for r in chosen], [r["l1"] for r in chosen], style, label=way)
        axis.set(title=f"linear branch: {scope}", xlabel="critical blocks (%)", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative L1 to dense, all layers")
    axes[0].legend()
    plt.rcParams["svg.hashsalt"] = "eff"
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "model", "quality", "plot", "levels"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096, 8192], help="of speed")
    parser.add_argument("--steps", type=int, default=1200, help="of the training of the dense encoder")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/sparse_linear_quality.svg"))
    parser.add_argument("--dry", action="store_true", help="do not write records of speed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "speed":
        speed(args.tokens, args.rounds, None if args.dry else RESULTS / "sparse_linear.jsonl")
    elif args.what == "model":
        whole_model(args.threads, args.rounds, None if args.dry else RESULTS / "sparse_linear_model.jsonl")
    elif args.what == "quality":
        quality(RESULTS / "sparse_linear_quality.json", args.steps)
    elif args.what == "levels":
        level_speed(args.rounds, None if args.dry else RESULTS / "sparse_linear_levels.jsonl")
        levels(RESULTS / "sparse_linear_levels.json", args.steps)
    else:
        plot(RESULTS / "sparse_linear_quality.json", args.plot)


if __name__ == "__main__":
    main()
