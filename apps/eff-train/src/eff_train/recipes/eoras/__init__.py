"""EoRaS: full masks of partly hidden objects in clips of rooms and of drawings that move (arXiv 2309.13248)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from eff_vision.amodal import (
    AmodalMeter,
    BEVConfig,
    EoRaS,
    EoRaSConfig,
    adapt_intrinsics_to_crop,
    amodal_loss,
    crop_frames,
    paste_masks,
)
from eff_vision.geometry import intrinsics_from_fov
from PIL import Image
from torch import Tensor, nn

from eff_train.drawing import from_image, open_picture
from eff_train.frame import HELD_OUT, Recipe, TrainConfig, as_built, generator, shuffled
from eff_train.recipes.eoras.clips import FIELD_OF_VIEW, Track, collage_track, mirrored, room_track


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of EoRaS.

    Attributes:
        world: Rooms whose objects move, or drawings of which the evaluation shows other ones than the training.
        pool: Clips to learn from; mirrored at random.
        frames: Pictures of a clip.
        side: Rows and columns of a frame.
        crop: Rows and columns of a crop.
        dim: Width of tokens and slots.
        slots: Object slots.
        bidirectional: Read clips backwards too.
        single: Give frames one by one, as a baseline without time.
        clips: Clips of the evaluation.
    """

    steps: int = 600
    batch_size: int = 4
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 5e-4
    eval_every: int = 300
    save_every: int = 150
    log_every: int = 25
    world: Literal["rooms", "collages"] = "rooms"
    pool: int = 512
    frames: int = 6
    side: int = 64
    crop: int = 64
    dim: int = 64
    slots: int = 4
    bidirectional: bool = True
    single: bool = False
    clips: int = 48


class Amodal(Recipe[Config]):
    """Crops around an object [batch, T, 3, crop, crop] to its full and visible masks; see `eff_vision.amodal`."""

    best = "+miou_occ"
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"miou_full": (">=", 0.7), "miou_occ": (">=", 0.2)}

    @property
    def model_config(self) -> EoRaSConfig:
        """Settings of the model."""
        c = self.config
        bev = BEVConfig(width=(-4.0, 4.0), height=(-2.0, 2.0), depth=(0.0, 8.0), cells=(16, 3, 16))
        return EoRaSConfig(
            d_model=c.dim, heads=4, layers=1, feedforward=2 * c.dim, slots=c.slots, features=c.dim, crop=c.crop,
            bev=bev, bidirectional=c.bidirectional, dropout=0.0,
        )  # fmt: skip

    def build(self) -> nn.Module:
        """The model."""
        return EoRaS(self.model_config)

    def track(self, seed: int, held_out: bool) -> Track:
        """A clip of the world."""
        c = self.config
        if c.world == "rooms":
            return room_track(seed, c.frames, c.side)
        return collage_track(seed, c.frames, c.side, held_out=held_out)

    @cached_property
    def drawn(self) -> dict[tuple[int, int], Track]:
        """Clips of the pool, by seed and number, once they were drawn."""
        return {}

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Clips of the pool, half of them mirrored."""
        c, tracks = self.config, []
        for sample, place in zip(samples, shuffled(samples, c.pool, c.seed), strict=True):
            if (c.seed, place) not in self.drawn:
                self.drawn[c.seed, place] = self.track(c.seed * c.pool + place, held_out=False)
            track = self.drawn[c.seed, place]
            tracks.append(mirrored(track) if generator(c.seed, sample).random() < 0.5 else track)
        return self.prepared(tracks)

    def prepared(self, tracks: list[Track]) -> dict[str, Tensor]:
        """Crops, their intrinsics, and soft masks of the decoder's size."""
        size, mask = self.config.crop, self.model_config.mask
        made: dict[str, list[Tensor]] = {"crops": [], "intrinsics": [], "full": [], "visible": []}
        for t in tracks:
            made["crops"].append(crop_frames(t.frames, t.boxes, size))
            made["intrinsics"].append(adapt_intrinsics_to_crop(t.intrinsics, t.boxes, size))
            made["full"].append(crop_frames(t.full[:, None], t.boxes, mask))
            made["visible"].append(crop_frames(t.visible[:, None], t.boxes, mask))
        batch = {name: torch.stack(parts) for name, parts in made.items()}
        if self.config.single:  # each frame a clip of its own
            batch = {name: value.flatten(0, 1)[:, None] for name, value in batch.items()}
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Focal loss on both masks."""
        b = {name: value.to(self.device) for name, value in batch.items()}
        output = model(b["crops"], b["intrinsics"])
        return amodal_loss(output, b["full"], b["visible"]), {}

    @cached_property
    def held_out(self) -> list[Track]:
        """Clips of the evaluation."""
        return [self.track(HELD_OUT + i, held_out=True) for i in range(self.config.clips)]

    @torch.no_grad()
    def masks(self, model: nn.Module, track: Track) -> Tensor:
        """Full masks in whole frames, bool [T, H, W]."""
        b = {name: value.to(self.device) for name, value in self.prepared([track]).items()}
        found = model(b["crops"], b["intrinsics"]).full.sigmoid().flatten(0, 1)
        side = self.config.side
        return paste_masks(found.cpu(), track.boxes, (side, side)) > 0.5

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Overlap of full masks and of their hidden parts, and that of the visible masks as the answer."""
        meter, plain = AmodalMeter(), AmodalMeter()
        for track in self.held_out:
            meter.update(self.masks(model, track), track.full, track.visible)
            plain.update(track.visible, track.full, track.visible)
        found, visible = meter.compute(), plain.compute()
        return {"miou_full": found.miou_full, "miou_occ": found.miou_occ, "visible_miou_full": visible.miou_full}

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Four clips: frames with the visible mask, the found full mask and the true one."""
        rows: list[np.ndarray] = []
        for track in self.held_out[:4]:
            found = self.masks(model, track)
            rows.extend(_tinted(track.frames, mask) for mask in (track.visible, found, track.full))
        Image.fromarray(np.concatenate(rows)).save(folder / "masks.png")

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Full masks of a folder of frames (000.png ...) with their visible masks (000-mask.png ...)."""
        from eff_vision.amodal import predict_track

        masks = sorted(file.glob("*-mask.png"))
        names = [p.with_name(p.name.replace("-mask", "")) for p in masks]
        if not masks or not all(p.is_file() for p in names):
            raise ValueError(f"{file} must hold frames such as 000.png and visible masks such as 000-mask.png")
        pictures, seen = [open_picture(p) for p in names], [open_picture(p, "L") for p in masks]
        if len(sizes := {image.size for image in pictures + seen}) > 1:
            raise ValueError(f"all frames and masks of {file} must have one size, got {sorted(sizes)}")
        frames = torch.stack([from_image(image) for image in pictures])
        visible = torch.stack([from_image(image.convert("RGB"))[0] > 0.5 for image in seen])
        intrinsics = intrinsics_from_fov(FIELD_OF_VIEW, *frames.shape[-2:])
        track = predict_track(as_built(model, EoRaS), frames.to(self.device), visible, intrinsics.to(self.device))
        out.mkdir(parents=True, exist_ok=True)
        full = track.full.cpu() > 0.5
        for path, frame, mask in zip(names, frames, full, strict=True):
            Image.fromarray(_tinted(frame[None], mask[None])).save(out / f"{path.stem}-full.png")
        return f"{len(names)} frames"

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, and the logits of both masks of a clip of the recipe's length as ONNX."""
        from eff_train.frame.onnx import write_onnx

        super().export(model, folder)
        prepared = self.prepared([self.track(HELD_OUT, held_out=True)])
        inputs = {name: prepared[name] for name in ("crops", "intrinsics")}
        write_onnx(Masks(as_built(model, EoRaS)), inputs, ("full", "visible"), folder / "eoras.onnx")


class Masks(nn.Module):
    """Logits of full and visible masks of clips without padding, without checks of the input."""

    def __init__(self, model: EoRaS) -> None:
        super().__init__()
        self.model = model

    def forward(self, crops: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
        """Of crops [B, T, 3, crop, crop] with their intrinsics [B, T, 3, 3]."""
        valid = torch.ones(crops.shape[:2], dtype=torch.bool, device=crops.device)
        fused, _ = self.model.fuse(crops, intrinsics, valid, None, None)
        flat = fused.flatten(0, 1)
        full, visible = (part(flat).unflatten(0, crops.shape[:2]) for part in (self.model.full, self.model.visible))
        return full, visible


def _tinted(frames: Tensor, masks: Tensor) -> np.ndarray:
    tint = torch.tensor([0.95, 0.2, 0.3])[:, None, None]
    shown = torch.where(masks[:, None], 0.45 * frames + 0.55 * tint, frames)
    return (torch.cat(list(shown), -1).movedim(0, -1) * 255).to(torch.uint8).numpy()


RECIPE = Amodal
