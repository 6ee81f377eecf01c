"""PixPro: cells of two crops of a photograph that show the same place agree, without labels (arXiv 2011.10043)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from eff_vision.pixpro import (
    ByolAugment,
    CnnCells,
    FeaturePyramid,
    PixPro,
    PixProConfig,
    PyramidCells,
    VitCells,
    export_backbone,
    positive_mask,
    random_flip,
    random_resized_crop,
)
from eff_vision.projection_head import probe
from torch import Tensor, nn

from eff_train.drawing import over, read_picture, sheet, squared, to_image
from eff_train.frame import HELD_OUT, Recipe, TrainConfig, as_built, generator, torch_generator

PICTURES = ("astronaut", "coffee", "cat", "rocket", "cells", "galaxies", "retina", "gravel", "coins", "camera")
WINDOW, SIDE = 96, 64
LIKENESS = ("components", *(f"like the cross {i}" for i in range(1, 5)))
KEPT = 120  # columns at the right of each photograph that no training window touches


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of PixPro.

    Attributes:
        objective: Agreement after propagation, contrast of cells, or the image-level branch alone (BYOL) as a baseline.
        architecture: A small ResNet, the same with a feature pyramid, or a small ViT whose patches are the cells.
        instance_weight: Of the image-level branch, in addition to the cells.
        dim: Features of a projected cell.
        hidden: Width inside the projector.
        momentum: Of the copy at the beginning.
        least: Smallest share of a window that a crop shows.
        windows: Of the evaluation.
        scenes: Rooms for the probe of classes; half of them train it.
    """

    steps: int = 250
    batch_size: int = 24
    lr: float = 1e-3
    warmup: int = 30
    weight_decay: float = 1e-4
    log_every: int = 20
    save_every: int = 100
    objective: Literal["pixpro", "pixcontrast", "instance"] = "pixpro"
    architecture: Literal["cnn", "fpn", "vit"] = "cnn"
    instance_weight: float = 0.0
    dim: int = 64
    hidden: int = 256
    momentum: float = 0.98
    least: float = 0.2
    windows: int = 100
    scenes: int = 160

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate != 1:
            raise ValueError(
                f"accumulate={self.accumulate} is not supported: the momentum copy moves once an update and batch norm "
                "would see a part of the batch"
            )
        if not 0 < self.least <= 1:
            raise ValueError(f"least is a share above 0 up to 1, got {self.least}")
        if self.instance_weight < 0:
            raise ValueError(f"instance_weight must not be negative, got {self.instance_weight}")
        if self.windows < 1 or self.scenes < 2:
            raise ValueError(f"wanted a window and two scenes or more, got {self.windows} and {self.scenes}")


class SmallResNet(nn.Module):
    """Two maps of a picture, finest first: [B, 48, H / 4, W / 4] and [B, 96, H / 8, W / 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_unit(3, 32, 2), _unit(32, 48, 2))
        self.fine = Residual(48)
        self.down = _unit(48, 96, 2)
        self.coarse = Residual(96)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Both maps."""
        fine = self.fine(self.stem(pictures))
        return [fine, self.coarse(self.down(fine))]


class Residual(nn.Module):
    """Two convolutions and what came in; the second norm begins at zero, so that the block begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _unit(width, width, 1), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """A map of the same shape."""
        return F.relu(x + self.norm(self.second(self.first(x))))


def _unit(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


def small_vit() -> nn.Module:
    """A ViT of transformers' DINOv2 class with patches of 8 points, width 96, depth 4."""
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, patch_size=8, image_size=SIDE)
    )


class Pixels(Recipe[Config]):
    """Two crops [batch, 3, 64, 64] of each window with their edges, to the loss; see `eff_vision.pixpro`."""

    needs = ("skimage", "sklearn", "transformers")
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {
        "probe": (">=", 0.65),
        "match": (">=", 0.08),
        "spread": (">=", 0.03),
    }

    @cached_property
    def photographs(self) -> list[Tensor]:
        """Photographs [3, H, W], at most 400 points high; their last `KEPT` columns are for the evaluation."""
        from eff_embedded.data import photograph

        made = []
        for name in PICTURES:
            picture = photograph(name)
            share = min(1.0, 400 / picture.height)
            picture = picture.resize((round(picture.width * share), round(picture.height * share)))
            made.append(torch.from_numpy(np.array(picture)).movedim(-1, 0).contiguous())
        return made

    def window(self, draw: np.random.Generator, *, train: bool) -> Tensor:
        """A window [3, 96, 96] of a photograph."""
        picture = self.photographs[int(draw.integers(len(self.photographs)))]
        height, width = picture.shape[1:]
        border = width - KEPT
        first, last = (0, border - WINDOW) if train else (border, width - WINDOW)
        y, x = int(draw.integers(height - WINDOW + 1)), int(draw.integers(first, last + 1))
        return picture[:, y : y + WINDOW, x : x + WINDOW].float() / 255

    def views(self, window: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two augmented crops and their edges."""
        made, edges = [], []
        for blur, solarize in ((0.5, 0.0), (0.1, 0.2)):
            view, crop = random_resized_crop(window, SIDE, chance, scale=(self.config.least, 1.0))
            view, crop = random_flip(view, crop, chance)
            made.append(ByolAugment(blur=blur, solarize=solarize)(view, chance))
            edges.append(crop)
        return made[0], made[1], edges[0], edges[1]

    def batch(self, samples: range) -> tuple[Tensor, ...]:
        """Views and edges of windows."""
        return self.pairs(samples, self.config.seed, train=True)

    def pairs(self, samples: range, seed: int, *, train: bool) -> tuple[Tensor, ...]:
        """Both views of each window and their edges."""
        made = [self.views(self.window(generator(seed, s), train=train), torch_generator(seed, s)) for s in samples]
        return tuple(torch.stack(part) for part in zip(*made, strict=True))

    def build(self) -> nn.Module:
        """Both branches."""
        c = self.config
        encoder: CnnCells | PyramidCells | VitCells
        if c.architecture == "cnn":
            encoder = CnnCells(SmallResNet(), 96)
        elif c.architecture == "fpn":
            encoder = PyramidCells(SmallResNet(), FeaturePyramid((48, 96), 96))
        else:
            encoder = VitCells(small_vit(), 96, 8)
        weight = 1.0 if c.objective == "instance" else c.instance_weight
        settings = PixProConfig(
            loss="pixcontrast" if c.objective == "pixcontrast" else "pixpro", dim=c.dim, hidden=c.hidden,
            instance_weight=weight, momentum=c.momentum,
        )  # fmt: skip
        return PixPro(encoder, settings, c.steps)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The objective; the slow copy moves first."""
        both = as_built(model, PixPro)
        momentum = both.update_momentum()
        out = both(*(2 * (x - 0.5) if x.ndim == 4 else x for x in batch))
        loss = out.instance if self.config.objective == "instance" else out.loss
        return loss, {"pixel": out.pixel, "empty": out.empty_pairs, "spread": out.spread, "momentum": momentum}

    def cells(self, model: nn.Module, pictures: Tensor) -> Tensor:
        """The coarsest map of cells of pictures from 0 to 1."""
        found = as_built(model, PixPro).encoder(2 * (pictures.to(self.device) - 0.5))
        return (found[-1] if isinstance(found, list) else found).cpu()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Do cells find their place in the other view, and can a linear probe name what is in them?"""
        a, b, edges_a, edges_b = self.pairs(range(self.config.windows), HELD_OUT, train=False)
        maps = [torch.cat([self.cells(model, x) for x in views.split(50)]) for views in (a, b)]
        mask = positive_mask(edges_a, edges_b, (maps[0].size(2), maps[0].size(3)))
        flat = [F.normalize((m - m.mean((0, 2, 3), keepdim=True)).flatten(2).mT, dim=-1) for m in maps]
        nearest = (flat[0] @ flat[1].mT).argmax(-1)
        right = mask.gather(-1, nearest[..., None])[..., 0]
        has = mask.any(-1)
        chance = (mask.float().mean(-1)[has]).mean()
        spread = F.normalize(maps[0].flatten(2).mT.flatten(0, 1), dim=-1).std(0).mean()
        return {
            "match": float(right[has].float().mean()),
            "match_chance": float(chance),
            "probe": self._probe(model),
            "spread": float(spread),
        }

    @cached_property
    def rooms(self) -> tuple[Tensor, Tensor]:
        """Rooms [N, 3, 64, 64], and the commonest class of each eighth of a side, [N, 8, 8]."""
        from eff_embedded.scenes import SceneConfig, make_path, make_scene, render_views

        pictures, classes = [], []
        for i in range(self.config.scenes):
            scene = make_scene(SceneConfig(num_objects=(3, 6)), seed=i)
            view = render_views(scene, make_path(scene, 1, seed=i, size=(SIDE, SIDE)), [0.0])
            pictures.append(view.colour[0])
            cells = view.classes[0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(2)
            classes.append(cells.mode(-1).values)
        return torch.stack(pictures), torch.stack(classes)

    def _probe(self, model: nn.Module) -> float:
        pictures, classes = self.rooms
        features = torch.cat([self.cells(model, x) for x in pictures.split(50)]).flatten(2).mT
        half = len(pictures) // 2
        labels = classes.flatten(1)
        return probe(
            features[:half].flatten(0, 1), labels[:half].flatten(), features[half:].flatten(0, 1),
            labels[half:].flatten(), kind="ridge",
        )  # fmt: skip

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Cells that resemble one cell of three photographs, and the first three components of cells as colours."""
        rows = []
        for name in ("cat", "astronaut", "coffee"):
            picture = squared(self.photographs[PICTURES.index(name)].float() / 255, 128)
            rows.append(self._likeness(model, picture))
        sheet(rows, columns=LIKENESS).save(folder / "likeness.png")

    def _likeness(self, model: nn.Module, picture: Tensor) -> list[Any]:
        """Components of cells as colours, then a heat map of the cosine with each of four cells."""
        maps = self.cells(model, picture[None])[0]
        _, rows, columns = maps.shape
        flat = maps.flatten(1).T
        flat = F.normalize(flat - flat.mean(0), dim=-1)
        _, _, directions = torch.linalg.svd(flat, full_matrices=False)
        parts = flat @ directions[:3].T
        low, high = parts.quantile(0.02, 0), parts.quantile(0.98, 0)
        colours = ((parts - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).T.unflatten(-1, (rows, columns))
        size = (picture.size(1), picture.size(2))
        shown = [to_image(F.interpolate(colours[None], size=size, mode="nearest")[0])]
        for y, x in ((0.3, 0.3), (0.3, 0.7), (0.7, 0.3), (0.7, 0.7)):
            at = int(y * rows) * columns + int(x * columns)
            view = over(picture, (flat @ flat[at]).view(rows, columns))
            shown.append(to_image(_crossed(view, int(y * size[0]), int(x * size[1]))))
        return shown

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Likeness maps of a picture of any content."""
        picture = squared(read_picture(file), 192)
        sheet([[to_image(picture), *self._likeness(model, picture)]], columns=["picture", *LIKENESS]).save(
            out / f"{file.stem}-likeness.png"
        )
        return f"{file.stem}-likeness.png"

    def export(self, model: nn.Module, folder: Path) -> None:
        """The backbone under its own names, and pictures from -1 to 1 to cells as ONNX."""
        from eff_train.frame.onnx import write_onnx

        encoder = as_built(model, PixPro).encoder
        export_backbone(encoder, folder / "model.safetensors")
        names = ("fine", "coarse") if isinstance(encoder, PyramidCells) else ("cells",)
        write_onnx(encoder, {"pictures": torch.rand(2, 3, SIDE, SIDE) * 2 - 1}, names, folder / "encoder.onnx")


def _crossed(view: Tensor, y: int, x: int) -> Tensor:
    view = view.clone()
    mark = torch.tensor([0.2, 1.0, 1.0])[:, None, None]
    view[:, max(0, y - 6) : y + 7, x : x + 2] = mark
    view[:, y : y + 2, max(0, x - 6) : x + 7] = mark
    return view


RECIPE = Pixels
