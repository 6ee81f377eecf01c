"""Lite3R: a copy of the teacher with sparse-linear attention, adapted through FP8 rounding by distilling attention."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from eff_attention.sparse_linear import SLAConfig, apply_sla, freeze_backbone, sla_parameters
from eff_kernels.edit import Distiller, Handle, cosine
from eff_quant.fp8_qat import FP8QATConfig, prepare_qat_
from eff_vision.multiview import (
    MultiViewBatch,
    MultiViewConfig,
    MultiViewTransformer,
    attention_layers,
    multiview_loss,
)
from torch import Tensor, nn

from eff_train.frame import HELD_OUT
from eff_train.recipes.lite3r.scores import scores
from eff_train.recipes.lite3r.views import ViewsConfig, ViewsRecipe


@dataclass(frozen=True, kw_only=True)
class Config(ViewsConfig):
    """Options of the adaptation.

    Attributes:
        teacher: Folder that ``eff-train export`` wrote for lite3r/teacher.
        keep_ratio: Share of keys that each query attends to exactly.
        selection: "token" as the paper trains; "block" is what runs fast.
        layers: Which attention is swapped.
        min_tokens: Calls with fewer keys stay dense, such as those of the camera head.
        init_std: Deviation of the projections' first values.
        fp8: Train through the rounding of FP8.
        fp8_projections: Round the new projections too, as the paper does.
        gamma: Weight of the distillation at the begin and at the end.
    """

    steps: int = 120
    batch_size: int = 4
    lr: float = 1e-3
    warmup: int = 30
    weight_decay: float = 0.0
    eval_every: int = 60
    save_every: int = 60
    log_every: int = 10
    teacher: Path = Path("teacher")
    keep_ratio: float = 0.3
    selection: Literal["token", "block"] = "token"
    layers: Literal["all", "encoder", "frame", "global", "camera"] = "all"
    min_tokens: int = 8
    init_std: float = 1e-3
    fp8: bool = True
    fp8_projections: bool = False
    gamma: tuple[float, float] = (0.1, 0.01)

    def sla(self) -> SLAConfig:
        """Settings of the attention."""
        if self.selection == "token":
            return SLAConfig(
                selection="token", k_high=self.keep_ratio, k_low=0.0, linear_scope="all", feature_map="elu",
                min_tokens=self.min_tokens,
            )  # fmt: skip
        return SLAConfig(
            k_high=self.keep_ratio, k_low=0.0, linear_scope="all", feature_map="elu", min_tokens=self.min_tokens
        )


def load_teacher(folder: Path) -> MultiViewTransformer:
    """The model that ``eff-train export`` wrote.

    Raises:
        FileNotFoundError: the folder does not hold it.
    """
    import json

    from safetensors.torch import load_file

    config, weights = folder / "config.json", folder / "model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: train lite3r/teacher and export it to {folder}")
    model = MultiViewTransformer(MultiViewConfig.from_dict(json.loads(config.read_text())))
    model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    return model.eval().requires_grad_(False)


def apply_lite3r(model: nn.Module, config: Config) -> Handle:
    """Swap attention, freeze everything but the new projections, and round linear layers through FP8.

    Args:
        model: A `MultiViewTransformer`, VGGT or Depth Anything 3.
        config: What to swap.

    Returns:
        A handle whose ``remove()`` gives the model back bit for bit.
    """
    names = list(attention_layers(model, config.layers))
    handle = apply_sla(model, config.sla(), targets=names, strict=True)
    generator = torch.Generator().manual_seed(config.seed)
    frozen = freeze_backbone(model)
    handle.on_remove(frozen.remove)
    with torch.no_grad():
        for p in sla_parameters(model):
            # Lite3R's projections have no bias: that of sparse-linear attention stays at zero.
            p.requires_grad_(p.dim() == 2)
            p.copy_(torch.randn(p.shape, generator=generator) * config.init_std * (p.dim() == 2))
    if config.fp8:
        skip = () if config.fp8_projections else ("*.sla.*",)
        rounded = prepare_qat_(model, FP8QATConfig(skip=skip))
        handle.on_remove(rounded.remove)
    return handle


def projections(model: nn.Module) -> list[nn.Parameter]:
    """What Lite3R trains: one matrix a layer."""
    return [p for p in sla_parameters(model) if p.requires_grad]


class Student(ViewsRecipe[Config]):
    """The teacher's copy, whose new projections alone are trained."""

    best = "-abs_rel"
    unused_parameters = True  # projections of layers that see fewer keys than `min_tokens`
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"abs_rel_over_teacher": ("<=", 1.25)}

    @cached_property
    def teacher(self) -> nn.Module:
        """The dense model, frozen."""
        return load_teacher(self.config.teacher).to(self.device)

    def build(self) -> nn.Module:
        """The copy with its attention swapped."""
        model = copy.deepcopy(self.teacher).cpu()
        apply_lite3r(model, self.config)
        return model

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The projections, without decay."""
        return [{"params": projections(model), "weight_decay": 0.0}]

    def batch(self, samples: range) -> tuple[MultiViewBatch, float]:
        """Fresh scenes, other ones than the teacher saw, and how far training is, from 0 to 1."""
        c = self.config
        made = self.scenes([(c.seed + 1) * 7 * HELD_OUT + s for s in samples])
        return made, samples.start / (c.steps * c.batch_size)

    def loss(
        self, model: nn.Module, batch: tuple[MultiViewBatch, float]
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Cameras and depth, and the distance of attention outputs to the teacher's."""
        truth, progress = batch
        inner = getattr(model, "module", model)
        names = list(attention_layers(self.teacher, self.config.layers))
        high, low = self.config.gamma
        with Distiller(inner, self.teacher, names, weight=cosine(high, low)) as distiller:
            with torch.no_grad():
                self.teacher(truth.images)
            output = model(truth.images)
            apart = distiller.loss(progress)
        loss, parts = multiview_loss(output, truth)
        return loss + apart, {**parts, "distillation": apart}

    @cached_property
    def teacher_scores(self) -> dict[str, float]:
        """Errors of the teacher, which stays as it is."""
        return scores(self.teacher, self.held_out)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Errors of student and teacher on the same scenes."""
        found = scores(model, self.held_out)
        dense = self.teacher_scores
        found |= {f"teacher_{name}": value for name, value in dense.items()}
        return found | {"abs_rel_over_teacher": found["abs_rel"] / max(dense["abs_rel"], 1e-12)}


RECIPE = Student
