"""A recipe with everything that several processes could get wrong, and what two of them do; torchrun starts this.

Rows of different length, parts of a batch, averaged weights, frozen weights, a list of blocks that FSDP gathers one by
one. Usage: torchrun --nproc-per-node=2 two_processes.py FOLDER. Writes ``ddp.json`` and ``fsdp.json``.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from eff_train.frame import Recipe, TrainConfig, Training, torch_generator, workers
from eff_train.frame.checkpoint import newest
from eff_train.frame.runs import Run, read_checkpoint, write_checkpoint
from torch import nn

UPDATES, BREAK = 6, 3


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the recipe."""

    steps: int = UPDATES
    batch_size: int = 8
    accumulate: int = 2
    lr: float = 0.05
    clip: float = 0.5
    ema: float = 0.5
    weight_decay: float = 0.1


class Blocks(nn.Module):
    """An embedding that is not trained, a list of blocks, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))
        self.head = nn.Linear(8, 11)

    def forward(self, words):
        x = self.embed(words)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Words(Recipe[Config]):
    """The next of random words that follow a rule."""

    def build(self):
        return Blocks()

    def batch(self, samples):
        rows = []
        for i in samples:
            start = torch.randint(11, (1,), generator=torch_generator(0, i))
            rows.append((start + 3 * torch.arange(2 + i % 5)) % 11)
        return torch.cat([r[:-1] for r in rows]), torch.cat([r[1:] for r in rows])

    def weight(self, batch):
        return len(batch[0])

    def loss(self, model, batch):
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]), {"size": logits.detach().abs().mean()}

    def evaluate(self, model):
        words = torch.arange(11)
        return {"loss": float(nn.functional.cross_entropy(model(words), (words + 3) % 11))}


RECIPE = Words


def losses(training, count):
    """Metrics of each of the next updates."""
    found = []
    for _ in range(count):
        training.update()
        found.append(training.read_means())
    return found


def go(folder, ranks):
    """Train unbroken and save in the middle; go on from what one process saved; judge."""
    config = Config(parallel=ranks.parallel)
    training = Training(Words(config), ranks)
    result = {"unbroken": losses(training, BREAK)}
    state = training.state_dict()
    if ranks.main:
        write_checkpoint(Run(folder / ranks.parallel), state, {})
    result["unbroken"] += losses(training, UPDATES - BREAK)
    with training.judged() as model:
        result["judged"] = training.recipe.evaluate(model) if ranks.main else {}
    shares = [p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in training.model.parameters()]
    result["share"] = sum(shares) / sum(p.numel() for p in training.model.parameters())
    again = Training(Words(config), ranks)
    again.load_state_dict(read_checkpoint(newest(Run(folder / "one").checkpoints, print)))
    result["resumed"] = losses(again, UPDATES - BREAK)
    if ranks.main:
        (folder / f"{ranks.parallel}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A process joins the others once: torchrun's store does not take the same names again.
    with workers("cpu") as both:
        for kind in ("ddp", "fsdp"):
            go(Path(sys.argv[1]), replace(both, parallel=kind))
