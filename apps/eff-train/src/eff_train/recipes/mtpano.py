"""MTPano: segmentation, depth and normals of panoramas from labels of perspective patches (arXiv 2602.05330)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from eff_vision.geometry import perspective_to_erp
from eff_vision.metrics import ConfusionMatrix, depth_metrics, normal_metrics
from eff_vision.multiview.blocks import Block
from eff_vision.panorama import (
    IGNORE,
    MultiTaskLoss,
    PanoLossConfig,
    PatchConfig,
    PDBridgeConfig,
    PDBridgeNet,
    aux_targets,
    sample_patches,
    turn,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from eff_train.drawing import from_image, open_picture
from eff_train.frame import HELD_OUT, Recipe, TrainConfig, generator
from eff_train.panorama_page import write_panorama_page


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of MTPano.

    Attributes:
        height: Rows of a panorama, which is twice as wide.
        patch: Points a side of a patch of the backbone.
        dim: Width of the backbone.
        bridge: Width of heads and bridge.
        streams: 2, or 1 shared one as a baseline.
        truncate: Cut gradients between streams.
        patches: Perspective labels that a panorama is covered with.
        depth_labels: Depth from one patch at a time, or from all of them stitched.
        scale_noise: Deviation of each patch's scale of depth, as teachers have it.
        label_noise: Share of wrong classes.
        rooms: Panoramas of the evaluation.
    """

    steps: int = 600
    batch_size: int = 4
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 1e-3
    eval_every: int = 300
    save_every: int = 150
    log_every: int = 25
    height: int = 48
    patch: int = 8
    dim: int = 64
    bridge: int = 32
    streams: Literal[1, 2] = 2
    truncate: bool = True
    patches: int = 8
    depth_labels: Literal["patch", "merged"] = "patch"
    scale_noise: float = 0.05
    label_noise: float = 0.03
    rooms: int = 32


class TinyViT(nn.Module):
    """A small transformer of patches that gives a map after each of its four blocks."""

    def __init__(self, dim: int, patch: int, height: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.blocks = nn.ModuleList(Block(dim, dim // 32, qk_norm=True, layer_scale=0.1) for _ in range(4))
        rows = height // patch
        self.positions = nn.Parameter(torch.randn(1, dim, rows, 2 * rows) * 0.02)

    def forward(self, panoramas: Tensor) -> list[Tensor]:
        """Four maps [B, dim, H / patch, W / patch]."""
        x = self.embed(panoramas * 2 - 1) + self.positions
        grid = x.shape[-2:]
        tokens, found = x.flatten(2).mT, []
        for block in self.blocks:
            tokens = block(tokens)
            found.append(tokens.mT.unflatten(-1, grid))
        return found


class Panorama(Recipe[Config]):
    """Panoramas [batch, 3, H, 2H] to classes, distance and normals; see `eff_vision.panorama`."""

    best = "-normals"
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"abs_rel": ("<=", 0.25), "normals": ("<=", 30.0)}

    @cached_property
    def classes(self) -> int:
        """Of the segmentation."""
        from eff_embedded.scenes import CLASSES

        return len(CLASSES)

    def build(self) -> nn.Module:
        """The model."""
        c = self.config
        config = PDBridgeConfig(
            classes=self.classes, channels=c.dim, dim=c.bridge, blocks=1, streams=c.streams, truncate=c.truncate
        )
        return PDBridgeNet(TinyViT(c.dim, c.patch, c.height), config)

    def room(self, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A panorama [3, H, 2H] and its exact labels by task."""
        from eff_embedded.scenes import VOID, SceneConfig, make_panorama, make_scene, render

        scene = make_scene(SceneConfig(num_objects=(3, 6)), seed=seed)
        view = render(scene, make_panorama(scene, seed=seed, height=self.config.height))
        classes = torch.where(view.classes == VOID, IGNORE, view.classes)
        return view.colour, {"semseg": classes, "depth": view.distance[None], "normals": view.camera_normals}

    def labelled(self, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A panorama, turned at random, with labels as teachers of patches give them: noisy, and not everywhere."""
        c = self.config
        picture, exact = self.room(seed)
        draw = generator(seed, 1)
        columns = int(draw.integers(0, 2 * c.height))
        picture, exact = picture.roll(-columns, -1), turn(exact, columns)
        chance = torch.Generator().manual_seed(int(draw.integers(2**62)))
        patches = sample_patches(PatchConfig(count=c.patches, height=48, width=64), generator=chance)
        scales = 1 + c.scale_noise * torch.randn(c.patches, generator=chance)
        masks = torch.stack(
            [perspective_to_erp(torch.ones(1, 1, 48, 64), r, fov, c.height)[1][0] for r, fov in patches]
        )
        covered = masks.any(0)
        wrong = torch.rand(covered.shape, generator=chance) < c.label_noise
        shuffled = torch.randint(0, self.classes, covered.shape, generator=chance)
        labels = {
            "semseg": torch.where(covered, torch.where(wrong, shuffled, exact["semseg"]), IGNORE),
            "normals": exact["normals"] * covered,
        }
        if c.depth_labels == "patch":
            labels["depth"] = exact["depth"] * scales[0] * masks[0]
        else:
            weight = (masks * scales[:, None, None]).sum(0) / masks.sum(0).clamp(min=1)
            labels["depth"] = exact["depth"] * weight
        return picture, labels

    def batch(self, samples: range) -> tuple[Tensor, dict[str, Tensor]]:
        """Fresh rooms."""
        made = [self.labelled(self.config.seed * HELD_OUT + s) for s in samples]
        pictures = torch.stack([picture for picture, _ in made])
        labels = {task: torch.stack([found[task] for _, found in made]) for task in made[0][1]}
        return pictures, labels | aux_targets(pictures, labels["depth"])

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, dict[str, Tensor]]
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """All tasks."""
        pictures, labels = batch
        total, parts = MultiTaskLoss(PanoLossConfig(radius=self.config.height // 4))(model(pictures), labels)
        return total, {name: part for name, part in parts.items() if "/" not in name}

    @cached_property
    def held_out(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Rooms of the evaluation with exact labels."""
        return [self.room(HELD_OUT + i) for i in range(self.config.rooms)]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean IoU, relative error of depth without alignment, mean angle of normals in degrees."""
        confusion, errors, angles = ConfusionMatrix(self.classes, IGNORE), [], []
        for picture, exact in self.held_out:
            main = model(picture[None].to(self.device)).main
            confusion.update(main["semseg"][0].argmax(0).cpu(), exact["semseg"])
            errors.append(depth_metrics(main["depth"][0].cpu(), exact["depth"]).abs_rel)
            found = F.normalize(main["normals"][0], dim=0).movedim(0, -1).cpu()
            angles.append(normal_metrics(found, exact["normals"].movedim(0, -1)).mean)
        return {
            "miou": confusion.mean_iou,
            "abs_rel": float(np.mean(errors)),
            "normals": float(np.mean(angles)),
        }

    @torch.no_grad()
    def samples(self, model: nn.Module, folder: Path) -> None:
        """Three rooms: picture, classes, distance and normals as found."""
        rooms = [picture for picture, _ in self.held_out[:3]]
        rows = [np.concatenate([*self._maps(p, self._found(model, p)).values()], 1) for p in rooms]
        Image.fromarray(np.concatenate(rows)).save(folder / "rooms.png")

    def _found(self, model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
        """The main tasks of one panorama."""
        return {k: v[0].cpu() for k, v in model(picture[None].to(self.device)).main.items()}

    def _maps(self, picture: Tensor, main: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The picture and what was found as pictures [H, 2H, 3], by name."""
        hue = main["semseg"].argmax(0).float() * (2 * math.pi / self.classes)
        classes = torch.stack([(hue + shift).cos() / 2 + 0.5 for shift in (0.0, 2.1, 4.2)])
        distance = 1 - (main["depth"] / main["depth"].amax().clamp(min=1e-6)).expand(3, -1, -1)
        normals = F.normalize(main["normals"], dim=0) / 2 + 0.5
        maps = {"picture": picture, "classes": classes, "distance": distance, "normals": normals}
        return {k: (v.clamp(0, 1).movedim(0, -1) * 255).to(torch.uint8).numpy() for k, v in maps.items()}

    @torch.no_grad()
    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Picture, classes, distance and normals side by side, a page to look around in, and coloured points."""
        from eff_vision.geometry.formats import write_ply
        from eff_vision.panorama import point_map

        image = open_picture(file)
        if image.width != 2 * image.height:
            raise ValueError(f"{file} is {image.width} x {image.height}; a panorama is twice as wide as high")
        small = image.resize((2 * self.config.height, self.config.height), Image.Resampling.LANCZOS)
        picture = from_image(small)
        out.mkdir(parents=True, exist_ok=True)
        main = self._found(model, picture)
        maps = self._maps(picture, main)
        Image.fromarray(np.concatenate([*maps.values()], 1)).save(out / f"{file.stem}-tasks.png")
        shown = {"picture": image.resize((1024, 512)) if image.height > 512 else image}
        shown |= {k: Image.fromarray(v) for k, v in maps.items() if k != "picture"}
        write_panorama_page(out / f"{file.stem}.html", file.stem, shown)
        points = point_map(main["depth"][None])[0].flatten(1).T
        write_ply(out / f"{file.stem}.ply", points, picture.flatten(1).T)
        return f"{file.stem}-tasks.png, {file.stem}.html and {file.stem}.ply"

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, and the main tasks of a panorama as ONNX."""
        from eff_train.frame.onnx import Chosen, write_onnx

        super().export(model, folder)
        names = "semseg", "depth", "normals"
        picture = {"panoramas": self.held_out[0][0][None]}
        tasks = Chosen(model, lambda output: tuple(output.main[name] for name in names))
        write_onnx(tasks, picture, names, folder / "mtpano.onnx")


RECIPE = Panorama
