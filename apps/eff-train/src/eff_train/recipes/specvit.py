"""LoLA-SpecViT: land cover of Indian Pines from patches of its bands, on splits that do not leak (arXiv 2506.17759)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from eff_vision.specvit import (
    HsiPatches,
    HsiScene,
    HsiSplit,
    LolaSpecViT,
    LolaSpecViTConfig,
    PCAReducer,
    hsi_split,
    load_hsi,
    oa_aa_kappa,
    predict_map,
    split_overlap,
)
from torch import Tensor, nn

from eff_train.drawing import distinct, sheet, to_image
from eff_train.frame import Recipe, TrainConfig, generator, shuffled


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of LoLA-SpecViT.

    Attributes:
        network: LoLA-SpecViT, or a 3-D convolutional network of like size as a baseline.
        split: "block" trains on whole blocks and leaves out test pixels whose patch reaches into one; "random" draws
            pixels, and leaks: patches of neighbours overlap.
        train: Share that trains: of blocks, or of each class's pixels.
        block: Side of a block in pixels.
        split_seed: Of the split. Of the seeds from here on the first is taken whose blocks hold each class.
        patch: Rows and columns around a pixel; odd.
        components: Of the bands, fitted on training pixels.
        standardize: Take each patch's mean and deviation away, as the official code does.
        smoothing: Share of the labels that is spread over all classes.
        rank: Of the adapters; 0 for none. They begin as the identity and are trained with everything else.
    """

    steps: int = 300
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 30
    weight_decay: float = 0.01
    log_every: int = 20
    save_every: int = 100
    network: Literal["lola", "cnn3d"] = "lola"
    split: Literal["block", "random"] = "block"
    train: float = 0.4
    block: int = 12
    split_seed: int = 0
    patch: int = 9
    components: int = 15
    standardize: bool = False
    smoothing: float = 0.1
    rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch < 5 or self.patch % 2 == 0:
            raise ValueError(f"patch must be odd and at least 5, got {self.patch}")
        if not 0 < self.train < 1:
            raise ValueError(f"train is a share between 0 and 1, got {self.train}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is a share from 0 to below 1, got {self.smoothing}")


class SpectralCnn(nn.Module):
    """The baseline: three convolutions over bands, rows and columns, and a linear layer.

    Args:
        classes: Number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths, layers = (1, 8, 16, 32), list[nn.Module]()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [
                nn.Conv3d(a, b, 3, stride=(2, 1, 1) if i else (1, 1, 1), padding=(1, 0, 0)),
                nn.BatchNorm3d(b),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool3d((4, 1, 1)), nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Linear(128, classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits [B, classes] of patches [B, components, P, P]."""
        return self.head(self.layers(patches[:, None]))


class SpecVit(Recipe[Config]):
    """Patches [batch, components, P, P] to logits of the pixel in the middle; see `eff_vision.specvit`."""

    needs = ("tensorly",)
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"oa": (">=", 0.45), "overlap": ("<=", 0.0)}

    @cached_property
    def pines(self) -> Any:
        """Indian Pines with names."""
        from eff_embedded.data import indian_pines

        return indian_pines()

    @cached_property
    def scene(self) -> HsiScene:
        """Indian Pines as arrays."""
        return HsiScene(np.ascontiguousarray(self.pines.cube.numpy().transpose(1, 2, 0)), self.pines.labels.numpy())

    @cached_property
    def parts(self) -> HsiSplit:
        """Which pixels train and which test."""
        return split_of(self.scene, self.config)

    @cached_property
    def reducer(self) -> PCAReducer:
        """Components, of the training pixels alone."""
        return PCAReducer(self.config.components).fit(self.scene.cube, self.parts.train)

    def patches(self, mask: np.ndarray, scene: HsiScene | None = None) -> HsiPatches:
        """Patches around the pixels of a mask."""
        c = self.config
        return HsiPatches(
            scene or self.scene, mask, patch=c.patch, reducer=self.reducer,
            standardize="patch" if c.standardize else None,
        )  # fmt: skip

    @cached_property
    def training(self) -> HsiPatches:
        """Patches that train."""
        return self.patches(self.parts.train)

    def build(self) -> nn.Module:
        """The network."""
        c, classes = self.config, len(self.pines.classes)
        if c.network == "cnn3d":
            return SpectralCnn(classes)
        return LolaSpecViT(
            LolaSpecViTConfig(
                in_bands=c.components, num_classes=classes, patch_size=c.patch, stem=(8, 8, 32), dims=(32, 64),
                depths=(1, 1), heads=(2, 4), lora_rank=c.rank, lora_alpha=max(1.0, 2.0 * c.rank), drop_path=0.1,
            )
        )  # fmt: skip

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        """Training patches, turned and mirrored."""
        places = torch.tensor(shuffled(samples, len(self.training), self.config.seed))
        patches = self.training.batch(places)
        turns = [int(generator(self.config.seed, s).integers(8)) for s in samples]
        turned = [torch.rot90(p, t % 4, (1, 2)) for p, t in zip(patches, turns, strict=True)]
        return (
            torch.stack([p.flip(-1) if t >= 4 else p for p, t in zip(turned, turns, strict=True)]),
            self.training.classes[places],
        )

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Cross-entropy, and the share of right answers."""
        patches, classes = batch
        logits = model(patches)
        return F.cross_entropy(logits, classes, label_smoothing=self.config.smoothing), {
            "accuracy": (logits.argmax(1) == classes).float().mean()
        }

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Overall and average accuracy, kappa, and the share of test pixels whose patch holds a training pixel."""
        test, found = self._tested(model)
        score = oa_aa_kappa(test.classes, found, len(self.pines.classes))
        return {
            "oa": score.oa,
            "aa": score.aa,
            "kappa": score.kappa,
            "overlap": split_overlap(self.parts, self.config.patch),
            "pixels": float(len(test)),
        }

    def _tested(self, model: nn.Module) -> tuple[HsiPatches, Tensor]:
        """Patches that test, and the class found for each."""
        test = self.patches(self.parts.test)
        order = torch.arange(len(test))
        return test, torch.cat([model(test.batch(i).to(self.device)).argmax(1).cpu() for i in order.split(512)])

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Colours, truth, split, and what was found at the test pixels."""
        found = np.zeros_like(self.scene.labels)
        found[self.parts.test] = self._tested(model)[1].numpy() + 1
        used = np.where(self.parts.train, 1, np.where(self.parts.test, 2, 0))
        marks = torch.tensor([[1.0, 1, 1], [0.1, 0.3, 0.7], [0.9, 0.6, 0.2]])
        shown = [
            to_image(false_colour(self.scene.cube), 2),
            to_image(self._coloured(self.scene.labels), 2),
            to_image(marks[used].movedim(-1, 0), 2),
            to_image(self._coloured(found), 2),
        ]
        sheet([shown], columns=["colours", "truth", "blue trains, yellow tests", "found where it tests"]).save(
            folder / "map.png"
        )

    def _coloured(self, labels: np.ndarray) -> Tensor:
        colours = torch.cat((torch.ones(1, 3), distinct(len(self.pines.classes))))
        return colours[labels].movedim(-1, 0)

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """A class for every pixel of a scene (.npz or .mat with a cube [H, W, 200], and labels or not)."""
        scene = read_scene(file)
        bands = self.scene.cube.shape[-1]
        if scene.cube.shape[-1] != bands:
            raise ValueError(f"{file} has {scene.cube.shape[-1]} bands, the model was trained on {bands}")
        labelled = scene.labels > 0
        patches = self.patches(labelled, scene)
        found = predict_map(model, patches)
        np.save(out / f"{file.stem}-classes.npy", found)
        shown = [to_image(false_colour(scene.cube), 3), to_image(self._coloured(found), 3)]
        columns = ["colours", "found"]
        if labelled.any():
            shown.append(to_image(self._coloured(scene.labels), 3))
            columns.append("labels of the file")
        legend(self.pines.classes, distinct(len(self.pines.classes))).save(out / "legend.png")
        sheet([shown], columns=columns).save(out / f"{file.stem}-map.png")
        counts = np.bincount(found.ravel(), minlength=len(self.pines.classes) + 1)[1:]
        most = ", ".join(f"{self.pines.classes[i]} {counts[i] / found.size:.0%}" for i in counts.argsort()[::-1][:4])
        return f"{most}; {file.stem}-map.png, legend.png and {file.stem}-classes.npy"

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, the components, and the network as ONNX (patches of components to logits)."""
        from eff_train.frame.onnx import write_onnx

        super().export(model, folder)
        np.savez(folder / "components.npz", mean=self.reducer.mean, components=self.reducer.components)
        write_onnx(model, {"patches": self.batch(range(8))[0]}, ("logits",), folder / "specvit.onnx")


def split_of(scene: HsiScene, config: Config) -> HsiSplit:
    """The split of the settings; block splits go on to the next seed until each class trains.

    Raises:
        ValueError: no seed of a thousand gives every class a training pixel.
    """
    problem = ""
    for seed in range(config.split_seed, config.split_seed + 1000):
        try:
            return hsi_split(
                scene.labels, mode=config.split, train=config.train, block=config.block, guard=config.patch // 2,
                seed=seed,
            )  # fmt: skip
        except ValueError as error:
            problem = str(error)
    raise ValueError(f"no split with every class in training: {problem}")


def read_scene(file: Path) -> HsiScene:
    """A scene of the user: as `load_hsi`, but labels may be missing.

    Raises:
        ValueError: no cube is in the file, or values are not finite.
    """
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            cubes = [k for k in arrays.files if arrays[k].ndim == 3]
            if len(cubes) == 1 and not any(arrays[k].ndim == 2 for k in arrays.files):
                cube = arrays[cubes[0]].astype(np.float32)
                return HsiScene(cube, np.zeros(cube.shape[:2], np.int64))
    return load_hsi(file)


def false_colour(cube: np.ndarray) -> Tensor:
    """Near infrared, red and green as red, green and blue [3, H, W], each stretched between two percentiles."""
    bands = cube.shape[-1]
    chosen = cube[..., [min(bands - 1, int(bands * s)) for s in (0.22, 0.13, 0.06)]]
    low, high = np.percentile(chosen, (2, 98), axis=(0, 1))
    return torch.from_numpy(((chosen - low) / np.maximum(high - low, 1e-9)).clip(0, 1)).float().movedim(-1, 0)


def legend(names: tuple[str, ...], colours: Tensor) -> Any:
    """Colours of the classes with their names."""
    squares = [[to_image(c[:, None, None].expand(3, 16, 16))] for c in colours]
    return sheet(squares, names)


RECIPE = SpecVit
