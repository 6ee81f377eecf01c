"""Distilling the attention of one layer of a teacher into the last layer of a student (section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from eff_kernels.edit import Settings
from torch import Tensor, nn

from eff_vision.unip.tap import AttentionTap


@dataclass(frozen=True, slots=True, kw_only=True)
class HADConfig(Settings):
    """Settings of `HybridAttentionDistillation`.

    Attributes:
        layer: Layer of the teacher, from 0; see `select_distill_layer`.
        temperature: Of both softmaxes.
        include_cls: Whether the class token takes part, as in the paper.
    """

    layer: int
    temperature: float = 1.0
    include_cls: bool = True

    def check(self) -> None:
        """The temperature is positive."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def attention_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over pictures, heads and queries of KL(teacher || student) of logits [B, heads, N, N], in float32.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"attention of the student is {list(student.shape)}, of the teacher {list(teacher.shape)}: heads and token "
            "grids must be the same; give the student's last block the teacher's number of heads"
        )
    s = (student.float() / temperature).log_softmax(-1)
    t = (teacher.float() / temperature).log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean()


class HybridAttentionDistillation(nn.Module):
    """The loss between the logits of a teacher's layer and those of a student's last layer.

    Values, projection and MLP of the student's last block get no gradient: fine-tuning starts them from where they are.

    Args:
        teacher: Frozen here, and kept in eval mode; run as a whole.
        student: What is trained.
        config: Settings.
        teacher_prefix: Class and register tokens of the teacher; registers are left out of the comparison.
        student_prefix: The same of the student.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        config: HADConfig,
        *,
        teacher_prefix: int = 1,
        student_prefix: int = 1,
    ) -> None:
        super().__init__()
        self.teacher, self.student, self.config = teacher.eval().requires_grad_(False), student, config
        self.prefix = (teacher_prefix, student_prefix)
        AttentionTap(teacher, [config.layer])  # an error now if there is no such layer

    def train(self, mode: bool = True) -> HybridAttentionDistillation:
        """Train the student; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, pictures: Tensor) -> Tensor:
        """The divergence on a batch of pictures."""
        return self.forward(pictures)

    def forward(self, pictures: Tensor) -> Tensor:
        """The divergence on a batch of pictures."""
        layer = self.config.layer
        with torch.no_grad(), AttentionTap(self.teacher, [layer], kind="logits") as tap:
            self.teacher(pictures)
        with AttentionTap(self.student, [-1], kind="logits", grad=True) as own:
            self.student(pictures)
        wanted, given = (
            _without_registers(x, p, include_cls=self.config.include_cls)
            for x, p in zip((tap[layer], own[-1]), self.prefix, strict=True)
        )
        return attention_divergence(given, wanted, self.config.temperature)


def _without_registers(logits: Tensor, prefix: int, *, include_cls: bool) -> Tensor:
    keep = [0] if include_cls and prefix else []
    index = torch.tensor([*keep, *range(prefix, logits.size(-1))], device=logits.device)
    return logits.index_select(-1, index).index_select(-2, index)


def layer_decay(depth: int, decay: float = 0.85, head_blocks: int = 1) -> list[float]:
    """Factor of the learning rate of each block when fine-tuning; the last ``head_blocks`` are not decayed.

    The last block's values, projection and MLP have had no gradient in pre-training, so it learns as fast as a head.
    """
    return [1.0 if i >= depth - head_blocks else decay ** (depth - i) for i in range(depth)]


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of tokens, each normalised: what the paper compares with."""
    return (F.layer_norm(student, student.shape[-1:]) - F.layer_norm(teacher, teacher.shape[-1:])).square().mean()
