"""What routers do, in numbers: a load that is even over the batch may still be blind to the domains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eff_adapters.lora_mixer.losses import entropy_of, usage
from eff_adapters.lora_mixer.passes import RouteRecord


@dataclass(frozen=True, slots=True)
class RouteStats:
    """Numbers of one routed projection.

    Attributes:
        load: Share of each expert in the chosen ones, [E], summing to 1.
        entropy: Mean entropy of a token's probabilities, over ln E: 0 is sure, 1 is even.
        mutual_information: Entropy of the mean minus the mean entropy, over ln E: 1 is balanced and sure.
        domain_load: The load by domain, [E, E], row d for tokens of domain d (NaN where there are none); None if the
            domains were not given.
    """

    load: Tensor
    entropy: float
    mutual_information: float
    domain_load: Tensor | None


def route_stats(record: RouteRecord, num_experts: int, top_k: int) -> RouteStats:
    """Numbers of one call; padding does not count."""
    probs, domains = record.probs.detach(), record.domains
    if record.mask is not None:
        keep = record.mask.to(probs.device)
        probs = probs[keep]
        domains = None if domains is None else domains.to(probs.device)[keep]
    most = math.log(num_experts) if num_experts > 1 else 1.0
    entropy, of_mean = float(entropy_of(probs).mean()), float(entropy_of(probs.mean(0)))
    by_domain = None
    if domains is not None:
        domains = domains.to(probs.device)
        none = torch.full((num_experts,), torch.nan, dtype=probs.dtype, device=probs.device)
        rows = [probs[domains == d] for d in range(num_experts)]
        by_domain = torch.stack([usage(r, top_k) if len(r) else none for r in rows])
    return RouteStats(usage(probs, top_k), entropy / most, (of_mean - entropy) / most, by_domain)
