"""Projection head: contrastive features of digits on textures, kept before the head and after it (arXiv 2403.11391)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from eff_vision.projection_head import (
    HeadedEncoder,
    IdentityInitHead,
    MLPHead,
    ReweightingHead,
    barlow_twins,
    evenness,
    nt_xent,
    probe,
    spectral_contrastive_loss,
)
from PIL import Image
from torch import Tensor, nn

from eff_train.drawing import lines, read_picture, sheet, squared, to_image
from eff_train.frame import Recipe, TrainConfig, generator, shuffled

SIDE, DIGIT, REACH, BLEND = 32, 16, 8, 0.7
TEXTURES = ("brick", "grass", "gravel", "coffee", "cat")
HELD_OUT_DIGITS = 297


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the projection head.

    Attributes:
        head: Behind the encoder: a trained MLP, a trained linear map that begins as the identity, fixed weights
            ``kappa^-i``, or nothing.
        objective: SimCLR's loss, the spectral contrastive one or Barlow Twins'.
        drop: Chance that a view loses its digit: how far the augmentation disrupts that feature.
        kappa: Of the fixed weights.
        width: Features before the head.
        out: Features after the MLP.
        temperature: Of SimCLR's loss.
    """

    steps: int = 300
    batch_size: int = 96
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 1e-6
    log_every: int = 20
    save_every: int = 100
    head: Literal["mlp", "linear", "reweight", "none"] = "mlp"
    objective: Literal["nt_xent", "spectral", "barlow_twins"] = "nt_xent"
    drop: float = 0.75
    kappa: float = 1.05
    width: int = 64
    out: int = 32
    temperature: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a chance between 0 and 1, got {self.drop}")
        if self.width < 8 or self.out < 1:
            raise ValueError(f"width must be at least 8 and out at least 1, got {self.width} and {self.out}")


class Items(NamedTuple):
    """Pictures without augmentation, and what is on them.

    Attributes:
        pictures: [N, 1, 32, 32].
        digits: [N].
        textures: [N].
    """

    pictures: Tensor
    digits: Tensor
    textures: Tensor


class ProjectionHead(Recipe[Config]):
    """Grey pictures [batch, 1, 32, 32] to features [batch, width] and their projection."""

    needs = ("sklearn", "skimage")
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"digit_pre": (">=", 0.45), "texture_pre": (">=", 0.55)}

    @cached_property
    def digits(self) -> tuple[Tensor, Tensor]:
        """All digits enlarged to [N, 16, 16], and their labels; the last `HELD_OUT_DIGITS` are for the probes."""
        from sklearn.datasets import load_digits

        found = load_digits()
        small = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
        large = F.interpolate(small, size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)
        return large[:, 0], torch.tensor(found.target)

    @cached_property
    def textures(self) -> list[Tensor]:
        """Grey photographs [H, W]; their last fourth is for the probes."""
        from eff_embedded.data import photograph

        grey = [np.asarray(photograph(name).convert("L"), np.float32) / 255 for name in TEXTURES]
        return [torch.from_numpy(g[:256].copy()) for g in grey]

    def build(self) -> nn.Module:
        """Four convolutions, the mean over places, and the head."""
        c = self.config
        widths = (1, c.width // 4, c.width // 2, c.width, c.width)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, 2 if i < 3 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        heads = {
            "mlp": lambda: MLPHead(c.width, c.width, c.out),
            "linear": lambda: IdentityInitHead(c.width),
            "reweight": lambda: ReweightingHead(c.width, c.kappa),
            "none": nn.Identity,
        }
        return HeadedEncoder(encoder, heads[c.head]())

    def _draw(self, places: list[int], chances: np.ndarray, *, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Windows [N, 40, 40] of textures, digits [N, 16, 16] and the number of each texture."""
        which = (chances[:, 0] * len(TEXTURES)).astype(int)
        side = SIDE + REACH
        windows = []
        for k, u, v in zip(which, chances[:, 1], chances[:, 2], strict=True):
            texture = self.textures[k]
            first, last = (0, 192 - side) if train else (192, 256 - side)
            y, x = first + int(u * (last - first)), int(v * (texture.size(1) - side))
            windows.append(texture[y : y + side, x : x + side])
        return torch.stack(windows), self.digits[0][places], torch.from_numpy(which)

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        """Two views [B, 1, 32, 32] of each item: another part of its window, another light, the digit lost or moved."""
        c = self.config
        places = shuffled(samples, len(self.digits[0]) - HELD_OUT_DIGITS, c.seed)
        chances = np.stack([generator(c.seed, s).random(17) for s in samples])
        windows, digits, _ = self._draw(places, chances, train=True)
        views = [self._view(windows, digits, chances[:, 3 + 7 * i : 10 + 7 * i]) for i in (0, 1)]
        return views[0], views[1]

    def _view(self, windows: Tensor, digits: Tensor, chances: np.ndarray) -> Tensor:
        y, x, down, right = (torch.from_numpy((chances[:, i] * (REACH + 1)).astype(int)) for i in range(4))
        view = _cut(windows, y, x, SIDE)
        kept = torch.from_numpy(chances[:, 4] >= self.config.drop)
        blend = torch.zeros_like(view)
        rows = (down + REACH // 2)[:, None] + torch.arange(DIGIT)
        columns = (right + REACH // 2)[:, None] + torch.arange(DIGIT)
        items = torch.arange(len(view))[:, None, None]
        blend[items, rows[:, :, None], columns[:, None, :]] = BLEND * kept[:, None, None].float()
        ink = torch.zeros_like(view)
        ink[items, rows[:, :, None], columns[:, None, :]] = digits
        view = view * (1 - blend) + ink * blend
        contrast, light = (torch.from_numpy(chances[:, i]).float()[:, None, None] for i in (5, 6))
        return ((view - 0.5) * (0.6 + 0.8 * contrast) + 0.5 + 0.4 * (light - 0.5)).clamp(0, 1)[:, None]

    def items(self, *, train: bool) -> Items:
        """Digits in the middle of textures, for the probes."""
        count = len(self.digits[0])
        places = list(range(count - HELD_OUT_DIGITS)) if train else list(range(count - HELD_OUT_DIGITS, count)) * 2
        chances = np.stack([generator(12345 + train, i).random(3) for i in range(len(places))])
        windows, digits, which = self._draw(places, chances, train=train)
        pictures = windows[:, REACH // 2 : REACH // 2 + SIDE, REACH // 2 : REACH // 2 + SIDE].clone()
        inner = slice(SIDE // 2 - DIGIT // 2, SIDE // 2 + DIGIT // 2)
        pictures[:, inner, inner] = (1 - BLEND) * pictures[:, inner, inner] + BLEND * digits
        return Items(pictures[:, None], self.digits[1][places], which)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The objective on the projections of both views."""
        a, b = (model(view).projection for view in batch)
        if self.config.objective == "spectral":
            return spectral_contrastive_loss(a, b), {}
        if self.config.objective == "barlow_twins":
            return barlow_twins(a, b), {}
        return nt_xent(a, b, temperature=self.config.temperature), {}

    @torch.no_grad()
    def both_sides(self, model: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features and projections of pictures."""
        parts = [model(p.to(self.device)) for p in pictures.split(256)]
        return torch.cat([p.features for p in parts]).cpu(), torch.cat([p.projection for p in parts]).cpu()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy of linear probes for digit and texture on both sides, and how even the features are there."""
        train, test = self.items(train=True), self.items(train=False)
        sides = self.both_sides(model, train.pictures), self.both_sides(model, test.pictures)
        values = {}
        for name in ("digit", "texture"):
            a, b = (getattr(items, name + "s") for items in (train, test))
            for i, side in enumerate(("pre", "post")):
                values[f"{name}_{side}"] = probe(sides[0][i], a, sides[1][i], b, kind="ridge")
        for i, side in enumerate(("pre", "post")):
            values[f"directions_{side}"] = evenness(sides[1][i]).participation_ratio
        return values

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Pairs of views, and the spectra of features on both sides of the head."""
        a, b = self.batch(range(10))
        sheet([[to_image(p, 3) for p in a], [to_image(p, 3) for p in b]], ["view 1", "view 2"]).save(
            folder / "views.png"
        )
        self._spectra(model).save(folder / "spectra.png")

    def _spectra(self, model: nn.Module) -> Image.Image:
        sides = self.both_sides(model, self.items(train=False).pictures)
        shown = {}
        for name, features in zip(("before the head", "after it"), sides, strict=True):
            values = torch.linalg.eigvalsh(torch.cov(features.double().T)).flip(0).clamp_min(1e-12)
            shown[name] = (values / values.sum()).clamp_min(1e-6).log10().tolist()
        return lines(shown, "log10 of the share of variance, by direction")

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """The pictures of the probes that are most like a picture, before and after the head, and both spectra."""
        picture = squared(read_picture(file).mean(0, keepdim=True), SIDE)
        known = self.items(train=False)
        shown, said = [], []
        for name, own, others in zip(
            ("before the head", "after it"),
            self.both_sides(model, picture[None]),
            self.both_sides(model, known.pictures),
            strict=True,
        ):
            near = F.cosine_similarity(own, others).topk(8).indices
            shown.append([to_image(picture, 3), *(to_image(known.pictures[i], 3) for i in near)])
            said.append(f"{name}: digits {' '.join(str(int(known.digits[i])) for i in near)}")
        sheet(shown, ["before the head", "after it"]).save(out / f"{file.stem}-neighbours.png")
        self._spectra(model).save(out / "spectra.png")
        return f"nearest {'; '.join(said)}; {file.stem}-neighbours.png and spectra.png"

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, and features and projection as ONNX."""
        from eff_train.frame.onnx import write_onnx

        super().export(model, folder)
        write_onnx(model, {"pictures": self.batch(range(4))[0]}, ("features", "projection"), folder / "encoder.onnx")


def _cut(windows: Tensor, y: Tensor, x: Tensor, side: int) -> Tensor:
    """Squares [N, side, side] of windows, each at a place of its own."""
    rows, columns = (start[:, None] + torch.arange(side) for start in (y, x))
    return windows[torch.arange(len(windows))[:, None, None], rows[:, :, None], columns[:, None, :]]


RECIPE = ProjectionHead
