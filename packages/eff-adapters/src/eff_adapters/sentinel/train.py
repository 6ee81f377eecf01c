"""Training a vision-language model on pairs: LoRA on its language model, the reference being itself without LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff_adapters.sentinel.collate import ContextPreferenceCollator, Example
from eff_adapters.sentinel.config import CDPOConfig
from eff_adapters.sentinel.loss import c_dpo_loss, sentence_logps


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update of the weights.

    Attributes:
        step: From 1 on.
        loss: Mean over its pairs.
        margin: Mean reward of good sentences less that of bad ones.
        accuracy: Share of pairs whose good sentence has the higher reward.
        lr: Learning rate.
        gradient: Norm of the gradients before they were scaled down.
    """

    step: int
    loss: float
    margin: float
    accuracy: float
    lr: float
    gradient: float


def add_lora(model: Any, config: CDPOConfig, **options: Any) -> Any:
    """LoRA of PEFT on all linear layers of the model's language model; nothing else trains.

    Args:
        model: A vision-language model of transformers, changed in place; ``unload()`` of the result takes that back.
        config: Rank and scale.
        options: More of ``LoraConfig``.

    Returns:
        The ``PeftModel``.

    Raises:
        ValueError: the language model has no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    decoder = model.get_decoder()
    inside = {id(m) for m in decoder.modules() if isinstance(m, nn.Linear)}
    names = [n for n, m in model.named_modules() if id(m) in inside]
    if not names:
        raise ValueError(f"the language model of {type(model).__name__} has no linear layer")
    before = list(model.parameters())
    chosen = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "target_modules": names}
    adapted = get_peft_model(model, LoraConfig(**{**chosen, **options}))
    for parameter in before:  # also those that PEFT takes for its own by their names
        parameter.requires_grad_(False)
    return adapted.eval()


def pair_logps(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of good and of bad sentences, [pairs] each."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    both = sentence_logps(model(**inputs, use_cache=False).logits, batch["labels"])
    chosen, rejected = both.chunk(2)
    return chosen, rejected


def c_dpo_step(model: Any, batch: dict[str, Any], config: CDPOConfig) -> tuple[Tensor, Tensor]:
    """Loss of a batch, and the margins [pairs]; the reference is the same model with its adapter off.

    Both run in the model's present mode: in evaluation mode, which `train_c_dpo` uses, dropout does not part them.
    """
    with torch.no_grad(), model.disable_adapter():
        ref_chosen, ref_rejected = pair_logps(model, batch)
    chosen, rejected = pair_logps(model, batch)
    out = c_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing)
    return out.loss, out.chosen_rewards - out.rejected_rewards


def train_c_dpo(
    model: Any,
    collator: ContextPreferenceCollator,
    examples: Sequence[Example],
    config: CDPOConfig,
    *,
    on_update: Callable[[Update], object] | None = None,
) -> list[Update]:
    """Train the adapter of a model from `add_lora` on pairs.

    Args:
        model: The ``PeftModel``; it is left in evaluation mode.
        collator: Makes the batches.
        examples: Images with pairs.
        config: Numbers.
        on_update: Is told of each update.

    Raises:
        ValueError: there are no pairs, or nothing of the model trains.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not examples or not trained:
        raise ValueError(f"{len(examples)} pairs and {len(trained)} trained parameters; both must be 1 or more")
    model.eval()
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    updates = config.epochs * math.ceil(len(examples) / config.batch_size)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, updates, config.warmup_ratio))
    generator = torch.Generator().manual_seed(config.seed)
    log: list[Update] = []
    for _ in range(config.epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(order), config.batch_size):
            chosen = order[first : first + config.batch_size]
            total, margins = 0.0, []
            for start in range(0, len(chosen), config.micro_batch_size):
                some = [examples[i] for i in chosen[start : start + config.micro_batch_size]]
                batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collator(some).items()}
                loss, margin = c_dpo_step(model, batch, config)
                share = len(margin) / len(chosen)
                (loss * share).backward()
                total += float(loss.detach()) * share
                margins.append(margin)
            gradient = float(nn.utils.clip_grad_norm_(trained, config.max_grad_norm))
            lr = float(rate.get_last_lr()[0])
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            all_margins = torch.cat(margins)
            log.append(
                Update(
                    step=len(log) + 1,
                    loss=total,
                    margin=float(all_margins.mean()),
                    accuracy=float((all_margins > 0).float().mean()),
                    lr=lr,
                    gradient=gradient,
                )
            )
            if on_update is not None:
                on_update(log[-1])
    return log


def rate_at(step: int, updates: int, warmup_ratio: float) -> float:
    """Learning rate before update ``step`` (from 0) over its peak: up in a line, down as half a cosine."""
    warm = math.ceil(updates * warmup_ratio)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, updates - warm)))
