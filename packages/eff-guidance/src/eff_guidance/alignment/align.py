"""Alignment of a diffusion transformer in training with a frozen vision transformer, for the first part of training."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from eff_kernels.edit import Handle
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, find_attention, observe_attention
from torch import Tensor, nn

from eff_guidance.alignment.config import HolisticAlignmentConfig
from eff_guidance.alignment.losses import attention_alignment_loss, feature_alignment_loss
from eff_guidance.alignment.teacher import TeacherAdapter, TeacherTargets
from eff_guidance.training import PhasedLoss, Trigger, find_blocks, unwrapped
from eff_guidance.training.students import block_at, block_width


class AlignmentLosses(NamedTuple):
    """Losses of one batch: scalars in float32.

    Attributes:
        feature: Minus the mean cosine of features.
        attention: Cross-entropy of attention, mean over the pairs of blocks.
        total: Their weighted sum, to be added to the main loss.
    """

    feature: Tensor
    attention: Tensor
    total: Tensor


class HolisticAlignment(PhasedLoss):
    """HASTE: hidden states and attention maps of the student follow a teacher's, until a trigger ends it (2505.16792).

    Run the student on a noisy batch, then add ``losses(clean_pictures).total`` to the loss. Train the parameters of
    this module (the projector) along with the student's. Once the phase is over, the hooks are out of the student, the
    teacher is freed, the projector is frozen, and ``losses`` gives zeros.

    Students are diffusion transformers of diffusers (DiT, SD3, FLUX) and those with timm's kind of attention in a list
    named ``blocks`` (DiT, SiT). Of joint attention only the picture's queries and keys count. Gradient checkpointing
    must be the non-reentrant kind. With torch.compile, attach before the first forward.

    With several processes keep this module out of DistributedDataParallel and call `sync_gradients` after the backward
    pass.

    Args:
        student: The model in training, as it is or inside DistributedDataParallel.
        teacher: The teacher; may be None where both weights are 0, or where ``losses`` gets the teacher's targets.
        config: What is aligned.
        trigger: Ends the phase, such as ``FixedStepTrigger(250_000)``; see `update`.

    Raises:
        ValueError: a block or pair does not exist, or the teacher has another width or fewer heads than asked for.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherAdapter | None,
        config: HolisticAlignmentConfig,
        *,
        trigger: Trigger | None = None,
    ) -> None:
        super().__init__(trigger)
        self.config, self.teacher = config, teacher
        if teacher is not None and teacher.dim != config.teacher_dim:
            raise ValueError(f"teacher_dim={config.teacher_dim}; the teacher's features have {teacher.dim} entries")
        if teacher is not None and config.lambda_attention:
            if wrong := [t for _, t in config.attention_pairs if t >= len(teacher.layers)]:
                raise ValueError(f"attention_pairs name blocks {wrong}; the teacher has 0 to {len(teacher.layers) - 1}")
            if (known := _heads_of(teacher.model)) is not None and config.heads > known:
                raise ValueError(f"heads={config.heads}; the teacher has {known} heads")
        inner = unwrapped(student)
        weight = next(p for p in inner.parameters() if p.is_floating_point())
        self.projector: nn.Module | None = None
        if config.lambda_feature:
            block = block_at(find_blocks(inner, config.blocks), config.feature_layer, "feature_layer")[1]
            width = block_width(inner, block)
            self.projector = make_projector(width, config.projector_dim, config.teacher_dim).to(weight.device)
        self.attach(student)

    def _hook(self, student: nn.Module, handle: Handle) -> None:
        c, inner = self.config, unwrapped(student)
        blocks = find_blocks(inner, c.blocks)
        if c.lambda_feature:
            self._keep_tokens(handle, block_at(blocks, c.feature_layer, "feature_layer")[1], "feature")
        if c.lambda_attention:
            wanted = dict.fromkeys(s for s, _ in c.attention_pairs)
            names = {_attention_of(inner, block_at(blocks, s, "attention_pairs")[0]): s for s in wanted}

            def keep(call: AttentionCall, output: AttentionOutput) -> None:
                if self.active and not call.recomputed:
                    self._seen["attention", names[call.name]] = _picture_part(call)

            handle.on_remove(observe_attention(inner, keep, where=list(names), grad=True).remove)

    @property
    def needs_teacher(self) -> bool:
        """Whether `losses` looks at a teacher: the phase is on and a weight is above 0."""
        return self.active and bool(self.config.lambda_feature or self.config.lambda_attention)

    def losses(self, pictures: Tensor | None = None, *, targets: TeacherTargets | None = None) -> AlignmentLosses:
        """The losses of the student's last forward pass.

        Args:
            pictures: The batch's clean pictures as the teacher takes them, [B, 3, H, W], uint8 or 0 to 1.
            targets: What the teacher says about them, if that is known already (``teacher(pictures, layers)`` with
                `teacher_layers`).

        Raises:
            RuntimeError: the student has not run since the last call, or ran without gradients.
            ValueError: shapes do not fit, or the phase is on and there is neither a picture nor a target.
        """
        if not self.needs_teacher:
            zero = torch.zeros((), device=pictures.device if pictures is not None else None)
            return AlignmentLosses(zero, zero, zero)
        c = self.config
        targets = self._targets(pictures) if targets is None else targets
        feature = attention = None
        if self.projector is not None:
            feature = self._feature(self.projector, self._take("feature"), targets)
        if c.lambda_attention:
            attention = self._attention(targets)
        device = (feature if feature is not None else attention).device  # type: ignore[union-attr]
        zero = torch.zeros((), device=device)
        feature, attention = (zero if x is None else x for x in (feature, attention))
        return AlignmentLosses(feature, attention, c.lambda_feature * feature + c.lambda_attention * attention)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Blocks of the teacher whose queries and keys `losses` wants in its targets, one for each pair."""
        return tuple(t for _, t in self.config.attention_pairs) if self.config.lambda_attention else ()

    def _targets(self, pictures: Tensor | None) -> TeacherTargets:
        if self.teacher is None or pictures is None:
            raise ValueError("the alignment is on: losses() needs clean pictures and a teacher, or targets=")
        return self.teacher(pictures, self.teacher_layers)

    def _feature(self, projector: nn.Module, hidden: Tensor, targets: TeacherTargets) -> Tensor:
        c = self.config
        found = projector(hidden.to(next(projector.parameters()).dtype))
        return feature_alignment_loss(
            found, targets.features.to(found.device), interpolate=c.interpolate, student_grid=c.student_grid,
            teacher_grid=targets.grid,
        )  # fmt: skip

    def _attention(self, targets: TeacherTargets) -> Tensor:
        c = self.config
        seen = {s: self._take(("attention", s)) for s, _ in c.attention_pairs}
        found = []
        for i, (s, _) in enumerate(c.attention_pairs):
            q, k, scale = seen[s]
            found.append(
                attention_alignment_loss(
                    q, k, targets.queries[i].to(q.device), targets.keys[i].to(q.device), heads=c.heads, scale_s=scale,
                    scale_t=targets.scales[i], interpolate=c.interpolate, student_grid=c.student_grid,
                    teacher_grid=targets.grid, chunk=c.chunk,
                )
            )  # fmt: skip
        return torch.stack(found).mean()

    def terminate(self) -> None:
        """End the alignment for good and free the teacher."""
        super().terminate()
        if self.teacher is not None:
            self.teacher.free()
            self.teacher = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "teacher": None}


def make_projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """REPA's projector: three linear layers with SiLU between them."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )


def _attention_of(model: nn.Module, block: str) -> str:
    """Name of the first attention in a block: of SD3.5's two the joint one."""
    for found in find_attention(model):
        if found.name.startswith(block + ".") and found.way:
            return found.name
    raise ValueError(f"the student's {block} holds no attention that can be reached")


def _picture_part(call: AttentionCall) -> tuple[Tensor, Tensor, float]:
    part = slice(None) if call.streams is None else call.streams["image"]
    return call.q[:, :, part], call.k[:, :, part], call.scale


def _heads_of(model: nn.Module | None) -> int | None:
    config: Any = getattr(model, "config", None)
    found = getattr(config, "num_attention_heads", None) if config is not None else getattr(model, "num_heads", None)
    return found if isinstance(found, int) else None
