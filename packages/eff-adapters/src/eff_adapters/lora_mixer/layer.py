"""A linear projection with experts and a router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, cast, get_args

import torch
from eff_kernels import grouped_lora
from eff_kernels.edit import uncompiled
from torch import Tensor, nn

from eff_adapters.lora_mixer.config import Mode
from eff_adapters.lora_mixer.passes import current_pass, domain_rows
from eff_adapters.lora_mixer.routing import dense_update, router_logits, straight_through_gates, top_routes


class Router(nn.Module):
    """A linear map from inputs to the logits of experts, without a bias; projections may share one.

    Args:
        weight: [E, in_features].
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class RoutedLoraLinear(nn.Module):
    """y = base_layer(x) + sum_e g_e(x) * scaling_e * B_e A_e x (arXiv 2507.00029, equation 4).

    The gates g are, by `mode`: "soft" p = softmax(router(x)), all experts; "sparse" the ``top_k`` largest of p,
    renormalised; "hard" the expert of the token's domain alone, see `LoraMixer.route`. Only ``base_layer(x)`` is ever
    called, so that it may be quantised.

    Args:
        base_layer: The projection, from [..., in] to [..., out].
        a: First factors, [E, R, in]; experts of a smaller rank are padded with zeros.
        b: Second factors, [E, out, R].
        scaling: alpha / r of each expert (alpha / sqrt(r) for rank-stabilised ones).
        router: May be shared with other projections.
        ranks: Of each expert; R for all if None.
        present: Whether each expert has weights here; the others are never chosen. All if None.
        top_k: Experts of a token in mode "sparse".
        temperature: Divides the logits.
        straight_through: In training in mode "sparse", take the gradient of the soft mixture.
        mode: See above.

    Raises:
        ValueError: shapes do not fit each other.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: Tensor
    present: Tensor
    trained: Tensor
    start_A: Tensor
    start_B: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        a: Tensor,
        b: Tensor,
        scaling: Sequence[float],
        router: Router,
        *,
        ranks: Sequence[int] | None = None,
        present: Sequence[bool] | None = None,
        top_k: int = 3,
        temperature: float = 1.0,
        straight_through: bool = False,
        mode: Mode = "sparse",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.top_k, self.temperature, self.straight_through = top_k, temperature, straight_through
        self.router = router
        self.set_experts(a, b, scaling, ranks, present)
        self.set_mode(mode)

    def set_experts(
        self,
        a: Tensor,
        b: Tensor,
        scaling: Sequence[float],
        ranks: Sequence[int] | None = None,
        present: Sequence[bool] | None = None,
    ) -> None:
        """Put other experts in the place of those that are held; the router must fit them."""
        num_experts, rank = a.shape[:2]
        if a.dim() != 3 or b.dim() != 3 or b.shape[0] != num_experts or b.shape[2] != rank:
            raise ValueError(f"a [E, R, in] and b [E, out, R] do not fit: got {list(a.shape)} and {list(b.shape)}")
        if len(scaling) != num_experts or self.router.weight.shape != (num_experts, a.shape[2]):
            raise ValueError(
                f"{num_experts} experts of {a.shape[2]} inputs need one scaling each and a router of that shape, got "
                f"{len(scaling)} and {list(self.router.weight.shape)}"
            )
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k={self.top_k} must be from 1 to the {num_experts} experts")
        device = a.device
        self.ranks = tuple([rank] * num_experts if ranks is None else ranks)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("scaling", torch.tensor(list(scaling), dtype=torch.float32, device=device))
        here = [True] * num_experts if present is None else list(present)
        self.all_present = all(here)
        self.register_buffer("present", torch.tensor(here, device=device))
        self.all_trained = True
        self.register_buffer("trained", torch.ones(num_experts, dtype=torch.bool, device=device), persistent=False)
        self.keep(())

    def set_mode(self, mode: Mode) -> None:
        """Choose the gates: "soft", "sparse" or "hard"."""
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r}; use 'soft', 'sparse' or 'hard'")
        self.mode: Mode = mode

    @property
    def num_experts(self) -> int:
        """E."""
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs of the projection."""
        return self.lora_A.shape[2]

    @property
    def out_features(self) -> int:
        """Outputs of the projection."""
        return self.lora_B.shape[1]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: for models that ask for its dtype. It knows nothing of the experts."""
        return cast("Tensor", self.base_layer.weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]; further arguments go to the base layer."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        lead = x.shape[:-1]
        rows, base = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        route = current_pass(self)
        if self.mode == "hard":
            ids = uncompiled(domain_rows)(route, lead, x.device)
            return self._update(rows, ids, None, base).view(y.shape)
        logits = router_logits(rows, self.router.weight, None if self.all_present else self.present, self.temperature)
        if route is not None:
            trains = self.training and self.router.weight.requires_grad
            uncompiled(route.record)(self, logits, lead, trains)
        if self.mode == "soft" or (self.straight_through and self.training):
            probs = logits.softmax(-1)
            gates = probs if self.mode == "soft" else straight_through_gates(probs, self.top_k)
            a, b = self._factors()
            return (base + dense_update(rows, a, b, gates * self.scaling).to(base.dtype)).view(y.shape)
        routes = top_routes(logits, self.top_k)
        return self._update(rows, routes.ids, routes.gates, base).view(y.shape)

    def _update(self, rows: Tensor, ids: Tensor, gates: Tensor | None, base: Tensor) -> Tensor:
        a, b = self._factors()
        return grouped_lora(rows, a, b, ids, gates, scale=self.scaling, y=base)

    def _factors(self) -> tuple[Tensor, Tensor]:
        if self.all_trained:
            return self.lora_A, self.lora_B
        keep = self.trained[:, None, None]
        return (
            torch.where(keep, self.lora_A, self.lora_A.detach()),
            torch.where(keep, self.lora_B, self.lora_B.detach()),
        )

    def train_experts(self, chosen: Sequence[bool]) -> None:
        """Say which experts get a gradient; the others get zeros, or none at all if no expert does."""
        for factor in (self.lora_A, self.lora_B):
            factor.requires_grad_(any(chosen))
            factor.grad = None
        self.all_trained = all(chosen) or not any(chosen)
        self.trained = torch.tensor(list(chosen), device=self.trained.device)

    def keep(self, chosen: Sequence[int], start: tuple[Tensor, Tensor] | None = None) -> None:
        """Hold experts to where they are now, or to the factors ``start``; `distance` says how far they have moved."""
        self.kept = tuple(chosen)
        a, b = start or (self.lora_A.detach().clone(), self.lora_B.detach().clone())
        self.register_buffer("start_A", a if chosen else None, persistent=False)
        self.register_buffer("start_B", b if chosen else None, persistent=False)

    def distance(self) -> Tensor:
        """Sum of squares by which the kept experts have moved, a scalar in float32 at least."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        if not self.kept:
            return torch.zeros((), dtype=wide, device=self.lora_A.device)
        index = list(self.kept)
        pairs = ((self.lora_A, self.start_A), (self.lora_B, self.start_B))
        moved = [(now[index].to(wide) - start[index].to(wide)).square().sum() for now, start in pairs]
        return moved[0] + moved[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scaling = self.scaling  # stays in float32 when the module is cast: alpha / r is no number of 8 bits
        super()._apply(fn, recurse)
        if not scaling.is_meta:
            self.scaling = scaling.to(self.scaling.device)
        return self

    def extra_repr(self) -> str:
        """For printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, experts={self.num_experts}, "
            f"ranks={list(self.ranks)}, top_k={self.top_k}, mode={self.mode!r}"
        )
