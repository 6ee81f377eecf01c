"""Losses and right answers by task, of any causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_train.recipes.lora_mixer.tasks import TASKS, Batch


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """Logits where the answer's tokens are to be told, [answer tokens, vocabulary]; the head sees no other place."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # padding is on the right: no mask
    logits: Tensor = model.lm_head(hidden[batch.targets >= 0])
    return logits.float()


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    return F.cross_entropy(logits, batch.targets[batch.targets >= 0])


@torch.no_grad()
def judged(logits_of: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> dict[str, float]:
    """Of each task the mean loss of a token, and the share of answers that greedy decoding gives in full.

    Args:
        logits_of: `answer_logits` of a model.
        batches: Questions.

    Returns:
        ``<task>_loss`` and ``<task>_right``, and the means over the tasks, ``loss`` and ``right``.
    """
    names, sums = list(TASKS), torch.zeros(len(TASKS), 4, dtype=torch.float64)
    for batch in batches:
        logits, places = logits_of(batch), batch.targets >= 0
        losses = F.cross_entropy(logits, batch.targets[places], reduction="none").double()
        wrong = torch.zeros_like(batch.targets).masked_scatter_(
            places, (logits.argmax(-1) != batch.targets[places]).long()
        )
        rows = places.nonzero()[:, 0]
        sums[:, 0].index_add_(0, batch.tasks[rows].cpu(), losses.cpu())
        sums[:, 1].index_add_(0, batch.tasks[rows].cpu(), torch.ones(len(rows), dtype=torch.float64))
        sums[:, 2].index_add_(0, batch.tasks.cpu(), (wrong.sum(1) == 0).double().cpu())
        sums[:, 3].index_add_(0, batch.tasks.cpu(), torch.ones(len(wrong), dtype=torch.float64))
    loss, right = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
    found = {f"{n}_loss": float(v) for n, v in zip(names, loss, strict=True)}
    found |= {f"{n}_right": float(v) for n, v in zip(names, right, strict=True)}
    return {**found, "loss": float(loss.mean()), "right": float(right.mean())}
