"""Three LoRA adapters of SmolLM2 in one run, each from the questions of its own task (LoRA-Mixer, first stage)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff_train.recipes.lora_mixer.questions import Options, Questions
from eff_train.recipes.lora_mixer.scores import answer_logits, answer_loss
from eff_train.recipes.lora_mixer.tasks import TASKS, Batch


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Options of the adapters.

    Attributes:
        rank: Of each adapter.
    """

    steps: int = 200
    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}; use at least 1")


class Experts(Questions[Config]):
    """The task of a question says which adapter answers and learns."""

    def build(self) -> nn.Module:
        """SmolLM2 with one new adapter a task on q, k, v and o; routers are no part of this stage."""
        from eff_adapters.lora_mixer import FreshExpert, LoraMixerConfig, apply_lora_mixer

        model = self.language_model()
        rank, settings = self.config.rank, LoraMixerConfig(top_k=1, expert_mode="joint", expert_dtype=torch.float32)
        mixer = apply_lora_mixer(model, settings, experts={n: FreshExpert(rank=rank, alpha=2.0 * rank) for n in TASKS})
        mixer.set_mode("hard")
        mixer.set_trainable(routers=False)
        return model

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Cross-entropy of the answers, and the share of tokens that are right."""
        logits = self.logits(model, batch)
        right = logits.argmax(-1) == batch.targets[batch.targets >= 0]
        return answer_loss(logits, batch), {"right": right.float().mean()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each question by the adapter of its task."""
        from eff_adapters.lora_mixer import LoraMixer

        with LoraMixer(model).route(domain_ids=batch.tasks):
            return answer_logits(model, batch)

    def answer(self, model: Any, prompt: str, task: int) -> str:
        """The greedy answer of one task's adapter."""
        from eff_adapters.lora_mixer import LoraMixer

        with LoraMixer(model).route(domain_ids=[task]):
            return self.told(model, prompt)

    def predict(self, model: Any, file: Path, out: Path) -> str:
        """Answer the questions of a text file, one a line, each by the adapter whose task its words show."""
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        return "\n".join(f"{line}{self.answer(model, line, task_of(line))}" for line in lines)


def task_of(prompt: str) -> int:
    """The number of the task that a prompt is of.

    Raises:
        ValueError: it is of none.
    """
    marks = {"Backwards:": "backwards", "Kind of": "kind"}
    task = next((t for mark, t in marks.items() if prompt.startswith(mark)), "sum" if "+" in prompt else "")
    if not task:
        raise ValueError(
            f"{prompt!r} is not a question of these tasks; ask '12 + 34 =', 'Backwards: a b c d =' or 'Kind of dog:'"
        )
    return list(TASKS).index(task)


RECIPE = Experts
