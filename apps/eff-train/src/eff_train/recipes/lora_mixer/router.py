"""The router of a LoRA mixture on SmolLM2, trained on a mix of the tasks of its frozen adapters (second stage)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eff_train.recipes.lora_mixer.questions import Options, Questions
from eff_train.recipes.lora_mixer.scores import answer_logits, answer_loss
from eff_train.recipes.lora_mixer.tasks import TASKS, Batch


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Options of the router.

    Attributes:
        adapters: Folder that ``eff-train export`` of ``lora-mixer/experts`` wrote, or any with one folder of PEFT a
            task under ``experts``. It must be given.
        top_k: Adapters of a token in use.
        entropy_mode: See `eff_adapters.lora_mixer.LoraMixerConfig`.
        entropy_coef: Weight of the entropy.
        balance_coef: Weight of the load balance.
    """

    steps: int = 100
    lr: float = 1e-2
    adapters: str = ""
    top_k: int = 1
    entropy_mode: Literal["peaked", "as_printed", "mutual_information"] = "peaked"
    entropy_coef: float = 1e-2
    balance_coef: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= len(TASKS):
            raise ValueError(f"top_k={self.top_k}; use 1 to {len(TASKS)}")


class Router(Questions[Config]):
    """Questions to answers, without being told of which task they are."""

    def build(self) -> nn.Module:
        """SmolLM2 with the adapters, frozen, and new routers."""
        from eff_adapters.lora_mixer import LoraMixerConfig, apply_lora_mixer

        c = self.config
        if not c.adapters:
            raise ValueError("adapters is empty; give the folder that export of lora-mixer/experts wrote")
        model = self.language_model()
        settings = LoraMixerConfig(
            top_k=c.top_k, entropy_mode=c.entropy_mode, entropy_coef=c.entropy_coef, balance_coef=c.balance_coef,
            expert_dtype=torch.float32,
        )  # fmt: skip
        apply_lora_mixer(model, settings, experts={n: Path(c.adapters) / "experts" / n for n in TASKS})
        return model

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Cross-entropy of the answers of the soft mixture, and the routing loss."""
        from eff_adapters.lora_mixer import LoraMixer

        mixer = LoraMixer(model)
        mixer.set_mode("soft")
        with mixer.route(domain_ids=batch.tasks, attention_mask=batch.mask):
            task = answer_loss(answer_logits(model, batch), batch)
        routing = mixer.losses()
        parts = {"task": task, "balance": routing.balance, "entropy": routing.entropy}
        return task + routing.total, {n: v.detach() for n, v in parts.items()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sparse mixture; it is not told the task."""
        from eff_adapters.lora_mixer import LoraMixer

        LoraMixer(model).set_mode("sparse")
        return answer_logits(model, batch)

    def answer(self, model: Any, prompt: str, task: int) -> str:
        """The greedy answer of the sparse mixture."""
        from eff_adapters.lora_mixer import LoraMixer

        LoraMixer(model).set_mode("sparse")
        return self.told(model, prompt)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """As of the adapters; and the load of each task's own adapter, the mean over projections."""
        from eff_adapters.lora_mixer import LoraMixer

        found, mixer = super().evaluate(model), LoraMixer(model)
        batch = self.held_out[0]
        with mixer.route(domain_ids=batch.tasks, attention_mask=batch.mask):
            self.logits(model, batch)
        loads = torch.stack([s.domain_load for s in mixer.stats().values() if s.domain_load is not None]).mean(0)
        return {**found, **{f"{n}_own_load": float(loads[i, i]) for i, n in enumerate(TASKS)}}

    def predict(self, model: Any, file: Path, out: Path) -> str:
        """Answer the questions of a text file, one a line."""
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        return "\n".join(f"{line}{self.answer(model, line, 0)}" for line in lines)


RECIPE = Router
