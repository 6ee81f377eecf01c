"""C-DPO: direct preference optimisation on a sentence, its context being part of the prompt (SENTINEL, equation 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class CDPOLoss(NamedTuple):
    """Mean loss, and the rewards of both sentences of each pair, [pairs], without gradients."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def c_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> CDPOLoss:
    """- log sigmoid(beta [(pi(y+) - ref(y+)) - (pi(y-) - ref(y-))]), the mean over pairs, in float32.

    Args:
        policy_chosen_logps: Summed log-probability of each good sentence, [pairs]; the others likewise.
        policy_rejected_logps: Of each bad sentence.
        ref_chosen_logps: By the reference model.
        ref_rejected_logps: By the reference model.
        beta: How closely the policy is held to the reference.
        label_smoothing: Chance that a pair is the wrong way round.

    Raises:
        ValueError: ``beta`` is not above 0, ``label_smoothing`` lies outside of [0, 0.5), or shapes differ.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}; use a number above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}; use 0 to below 0.5")
    given = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if any(x.shape != given[0].shape for x in given) or given[0].dim() != 1 or not len(given[0]):
        raise ValueError(f"log-probabilities have shapes {[list(x.shape) for x in given]}; use [pairs] for all four")
    chosen = beta * (policy_chosen_logps.float() - ref_chosen_logps.float())
    rejected = beta * (policy_rejected_logps.float() - ref_rejected_logps.float())
    logit = chosen - rejected
    each = -(1 - label_smoothing) * functional.logsigmoid(logit) - label_smoothing * functional.logsigmoid(-logit)
    return CDPOLoss(each.mean(), chosen.detach(), rejected.detach())


def sentence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed log-probability of each row's sentence, float32 [batch].

    Args:
        logits: [batch, tokens, vocabulary], of any float dtype.
        labels: int64 [batch, tokens]: the token itself where it belongs to the sentence, -100 elsewhere.

    Raises:
        ValueError: shapes differ, or a row has no token of a sentence.
    """
    if logits.shape[:-1] != labels.shape or labels.dim() != 2:
        raise ValueError(
            f"logits have shape {list(logits.shape)}, labels {list(labels.shape)}; use [B, T, V] and [B, T]"
        )
    targets = labels[:, 1:]
    counted = targets != -100
    if not (has := counted.any(1)).all():
        raise ValueError(
            f"rows {(~has).nonzero().flatten().tolist()} have no token of a sentence behind the first token"
        )
    rows, places = counted.nonzero(as_tuple=True)
    chosen = logits[rows, places].float()  # [tokens of sentences, vocabulary]: few of all tokens
    each = chosen.gather(1, targets[rows, places][:, None])[:, 0] - torch.logsumexp(chosen, 1)
    return each.new_zeros(len(labels)).index_add(0, rows, each)
