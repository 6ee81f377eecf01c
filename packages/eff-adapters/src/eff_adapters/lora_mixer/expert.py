"""One expert: the low-rank factors of an adapter, wherever they come from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from eff_adapters.lora_mixer.peft_settings import checked_settings, scaling_of

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


class LoraWeights(NamedTuple):
    """Factors of one projection, a [r, in] and b [out, r], and the factor of their product (alpha / r)."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshExpert:
    """An expert that is still to be trained: a as PEFT draws it (Kaiming uniform), b zero, on all targets.

    Attributes:
        rank: r.
        alpha: The update is multiplied by alpha / rank.
        rslora: By alpha / sqrt(rank) instead.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < float("inf"):
            raise ValueError(f"rank={self.rank} must be at least 1, alpha={self.alpha} positive and finite")

    @property
    def scaling(self) -> float:
        """Factor of the product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraExpert:
    """An adapter that exists.

    Attributes:
        weights: By the name of the projection in the base model.
        settings: Those of PEFT, as in ``adapter_config.json``.
    """

    weights: Mapping[str, LoraWeights]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """Name or folder of the model that it was trained on, if it says."""
        return self.settings.get("base_model_name_or_path") or None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], settings: Any) -> LoraExpert:
        """Read an adapter from tensors with PEFT's names.

        Args:
            state: ``[base_model.model.]<module>.lora_A[.<adapter>].weight`` [r, in], and lora_B [out, r].
            settings: PEFT's ``LoraConfig``, or what its ``to_dict`` or ``adapter_config.json`` holds.

        Raises:
            ValueError: a kind of adapter that is no plain LoRA, parts are missing, or shapes do not fit.
            TypeError: something that is no tensor.
        """
        plain = checked_settings(settings)
        factors: dict[str, dict[str, Tensor]] = {}
        other = []
        for key, tensor in state.items():
            found = _KEY.fullmatch(key)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{key} is a {type(tensor).__name__}, wanted a tensor")
            if found is None:
                other.append(key)
            elif found["factor"] in factors.setdefault(found["module"].removeprefix(_PREFIX), {}):
                raise ValueError(f"the state dict holds several adapters: {key} occurs twice; pass one adapter")
            else:
                factors[found["module"].removeprefix(_PREFIX)][found["factor"]] = tensor
        if other:
            raise ValueError(
                f"the adapter holds more than low-rank factors of projections: {sorted(other)[:4]}; DoRA, biases, "
                "embeddings and whole modules are not supported"
            )
        if not factors:
            raise ValueError("the adapter holds no lora_A and lora_B weights")
        weights = {}
        for name, pair in factors.items():
            if len(pair) < 2:
                raise ValueError(f"{name} has only lora_{next(iter(pair))}; the other factor is missing")
            a, b = pair["A"], pair["B"]
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"{name}: lora_A must be [r, in] and lora_B [out, r], got {list(a.shape)} and {list(b.shape)}; "
                    "adapters of convolutions are not supported"
                )
            if not (a.is_floating_point() and b.is_floating_point()):
                raise TypeError(f"{name}: the factors must be float, got {a.dtype} and {b.dtype}")
            weights[name] = LoraWeights(a.detach(), b.detach(), scaling_of(plain, name, a.shape[0]))
        return cls(weights=weights, settings=plain)
