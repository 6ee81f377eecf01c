"""What teaches the routers: balance over the batch and peaked routes of each token (arXiv 2507.00029, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_adapters.lora_mixer.config import EntropyMode


class RoutingLoss(NamedTuple):
    """Scalars: ``total`` to add to a task's loss; ``balance`` and mean ``entropy`` (nats) have no weights."""

    total: Tensor
    balance: Tensor
    entropy: Tensor


def specialization_balance_loss(
    probs: Tensor,
    mask: Tensor | None = None,
    *,
    balance_coef: float = 1e-2,
    entropy_coef: float = 1e-2,
    mode: EntropyMode = "peaked",
    usage_k: int = 1,
    scale_balance: bool = True,
) -> RoutingLoss:
    """The routing loss of one router (SBL in version 1 of the paper, RSL in version 2, equation 5).

    With pbar the mean of p over the tokens and f the share of each expert in their ``usage_k`` largest (no gradient):
    balance = E sum_e pbar_e f_e, entropy = mean of -sum_e p_e log p_e, and the total is

    - "peaked": balance_coef * balance + entropy_coef * entropy. Routes of a token become sure.
    - "as_printed": balance_coef * balance - entropy_coef * entropy, the paper's sign, which evens the routes.
    - "mutual_information": -entropy_coef * (H(pbar) - entropy), from -entropy_coef ln E to 0.

    Under data parallel training each process takes the means over its own tokens.

    Args:
        probs: Probabilities, [..., E]; any float dtype, computed in float32 at least.
        mask: [...], true or non-zero where a token counts; all if None.
        balance_coef: alpha.
        entropy_coef: lambda.
        mode: See above.
        usage_k: Of the largest probabilities of a token, how many count as use.
        scale_balance: Whether the balance has the factor E (ours), which makes it 1 when balanced.

    Raises:
        ValueError: shapes do not fit, no token counts, or an unknown mode.
    """
    num_experts = probs.shape[-1]
    p = probs.flatten(0, -2).to(torch.promote_types(probs.dtype, torch.float32))
    if not 1 <= usage_k <= num_experts:
        raise ValueError(f"usage_k={usage_k} must be from 1 to the {num_experts} experts")
    if mask is not None:
        if mask.shape != probs.shape[:-1]:
            raise ValueError(f"mask must have shape {list(probs.shape[:-1])}, got {list(mask.shape)}")
        p = p[mask.flatten() != 0]
    if not p.shape[0]:
        raise ValueError("no token counts: the mask is empty or all false")
    mean = p.mean(0)
    entropy = entropy_of(p).mean()
    balance = (mean * usage(p, usage_k)).sum() * (num_experts if scale_balance else 1)
    if mode == "peaked":
        total = balance_coef * balance + entropy_coef * entropy
    elif mode == "as_printed":
        total = balance_coef * balance - entropy_coef * entropy
    elif mode == "mutual_information":
        total = -entropy_coef * (entropy_of(mean) - entropy)
    else:
        raise ValueError(f"mode={mode!r}; use 'peaked', 'as_printed' or 'mutual_information'")
    return RoutingLoss(total, balance, entropy)


def usage(probs: Tensor, k: int) -> Tensor:
    """Share of each expert in the ``k`` largest of probs [N, E], [E], summing to 1; no gradient."""
    chosen = probs.detach().topk(k, dim=-1).indices.flatten()
    counts = torch.zeros(probs.shape[-1], dtype=probs.dtype, device=probs.device)
    return counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=probs.dtype)) / chosen.numel()


def entropy_of(probs: Tensor) -> Tensor:
    """-sum p log p in nats over the last dimension; at p = 0 value and gradient are finite."""
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)
