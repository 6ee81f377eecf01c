"""A small convolutional network reads handwritten digits (scikit-learn's 1,797 pictures of 8 x 8 points)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from eff_train.frame import Recipe, TrainConfig, generator, shuffled

HELD_OUT = 297


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the digits recipe.

    Attributes:
        width: Channels of the first convolution; the second has twice as many.
        dropout: Share of features that are dropped before the last layer.
        shift: Farthest that a training picture is moved, in points.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.01
    ema: float = 0.98
    eval_every: int = 100
    save_every: int = 100
    width: int = 32
    dropout: float = 0.2
    shift: int = 1


class Digits(Recipe[Config]):
    """Pictures [batch, 1, 8, 8] with values from 0 to 1 to logits [batch, 10]."""

    needs = ("sklearn",)
    best = "+accuracy"
    thresholds: ClassVar = {"accuracy": (">=", 0.95)}

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """All pictures and their labels; the last `HELD_OUT` are for the evaluation."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)

    def build(self) -> nn.Module:
        """Two convolutions and a linear layer."""
        width = self.config.width
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(self.config.dropout),
            nn.Linear(2 * width * 16, 10),
        )

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        """Training pictures, each moved by a few points, and their labels."""
        pictures, labels = self.data
        places = shuffled(samples, len(pictures) - HELD_OUT, self.config.seed)
        reach = self.config.shift
        moved = []
        for sample, place in zip(samples, places, strict=True):
            x, y = generator(self.config.seed, sample).integers(-reach, reach + 1, 2).tolist()
            padded = F.pad(pictures[place], (reach,) * 4)
            moved.append(padded[:, reach + y : reach + y + 8, reach + x : reach + x + 8])
        return torch.stack(moved), labels[places]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Cross-entropy, and the share of right answers."""
        pictures, labels = batch
        logits = model(pictures)
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and share of right answers on the pictures that were held out."""
        pictures, labels = (x[-HELD_OUT:].to(self.device) for x in self.data)
        logits = model(pictures)
        return {
            "loss": float(F.cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(1) == labels).float().mean()),
        }

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Write the first held out pictures in two rows, and what was read in them."""
        pictures = self.data[0][-HELD_OUT:][:20]
        read = model(pictures.to(self.device)).argmax(1).tolist()
        rows = [np.concatenate([p[0].numpy() for p in pictures[i : i + 10]], 1) for i in (0, 10)]
        sheet = Image.fromarray((255 * np.concatenate(rows)).astype(np.uint8))
        sheet.resize((640, 128), Image.Resampling.NEAREST).save(folder / "digits.png")
        (folder / "read.txt").write_text("\n".join(" ".join(map(str, read[i : i + 10])) for i in (0, 10)) + "\n")

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Read one digit from a picture file: light on dark, or dark on light."""
        picture = ImageOps.pad(Image.open(file).convert("L"), (8, 8))
        if np.asarray(picture).mean() > 127:
            picture = ImageOps.invert(picture)
        values = torch.from_numpy(np.asarray(picture, np.float32) / 255)[None, None]
        odds = model(values.to(self.device)).softmax(1)[0]
        return f"{int(odds.argmax())} ({float(odds.max()):.0%})"


RECIPE = Digits
