"""Settings of a mixture of LoRA experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from eff_kernels.edit import Settings

Mode = Literal["soft", "sparse", "hard"]
EntropyMode = Literal["peaked", "as_printed", "mutual_information"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraMixerConfig(Settings):
    """Which projections are routed, how, and what their routers are taught.

    Attributes:
        target_modules: Projections that get experts and a router: names, or patterns as in `eff_kernels.edit.select`.
        top_k: Experts of a token in mode "sparse".
        router_scope: "module": a router for each projection. "input": projections of one block that read the same
            input (q, k and v; gate and up) share one.
        temperature: Divides the router's logits.
        balance_coef: alpha, weight of the load balance over the batch.
        entropy_coef: lambda, weight of the entropy of each token's routes.
        entropy_mode: "peaked" lowers the entropy, "as_printed" raises it (the sign in the paper's equation 5),
            "mutual_information" puts ``-lambda (H(mean p) - mean H(p))`` in the place of both terms.
        usage_k: Of the most probable experts of a token, how many count as used in the balance.
        scale_balance: Whether the balance is multiplied by the number of experts, which makes it 1 when balanced.
        straight_through: In training in mode "sparse", take the gradient of the soft mixture.
        expert_mode: "reuse" freezes the experts, "joint" trains them.
        preserve_coef: beta, weight of the squared distance of experts from where they started; needs "joint".
        preserve_experts: Names of the experts that are held so; all if empty.
        router_init_std: Standard deviation of new routers.
        expert_dtype: Of the factors; that of the projection's weight if None.
        allow_partial: Whether adapters may hold projections that are not among ``target_modules``; these are left out.
    """

    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    top_k: int = 3
    router_scope: Literal["module", "input"] = "module"
    temperature: float = 1.0
    balance_coef: float = 1e-2
    entropy_coef: float = 1e-2
    entropy_mode: EntropyMode = "peaked"
    usage_k: int = 1
    scale_balance: bool = True
    straight_through: bool = False
    expert_mode: Literal["reuse", "joint"] = "reuse"
    preserve_coef: float = 0.0
    preserve_experts: tuple[str, ...] = ()
    router_init_std: float = 0.02
    expert_dtype: torch.dtype | None = None
    allow_partial: bool = False

    def check(self) -> None:
        """See `Settings`."""
        if not self.target_modules or not all(self.target_modules):
            raise ValueError(f"target_modules={self.target_modules}; name at least one projection, none may be empty")
        if self.top_k < 1 or self.usage_k < 1:
            raise ValueError(f"top_k={self.top_k}, usage_k={self.usage_k}; both must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        for name in ("balance_coef", "entropy_coef", "preserve_coef", "router_init_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")
        if self.preserve_coef and self.expert_mode != "joint":
            raise ValueError("preserve_coef holds experts that are trained; set expert_mode='joint' with it")
        if self.preserve_experts and not self.preserve_coef:
            raise ValueError(f"preserve_experts={self.preserve_experts} without preserve_coef does nothing; set it too")
        if self.expert_dtype is not None and not self.expert_dtype.is_floating_point:
            raise ValueError(f"expert_dtype={self.expert_dtype} is not a float dtype")

    def check_experts(self, names: tuple[str, ...]) -> None:
        """Refuse a number of experts, or names, that do not fit these settings."""
        for name in ("top_k", "usage_k"):
            if getattr(self, name) > len(names):
                raise ValueError(f"{name}={getattr(self, name)} is more than the {len(names)} experts {list(names)}")
        if unknown := sorted(set(self.preserve_experts) - set(names)):
            raise ValueError(f"preserve_experts names {unknown}; the experts are {list(names)}")
