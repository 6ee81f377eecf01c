"""Settings of the two halves: building pairs, and training on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelConfig(Settings):
    """How pairs of sentences are built (SENTINEL, algorithm 1).

    Attributes:
        n_candidates: Sentences sampled from each context.
        max_sentences: Most sentences of one picture's context.
        max_new_tokens: Most tokens of a sampled sentence.
        temperature, top_p: Of sampling.
        require_coherent: A pair's good sentence names something that its context names; at the beginning nothing is
            named yet, and any good sentence will do.
        retries: How often a context without a good sentence is sampled again before its picture is left.
        seed: Of all sampling; each picture and step draws by itself, in whatever order pictures come.
    """

    tags: ClassVar[Mapping[str, str]] = {"method": "sentinel"}

    n_candidates: int = 5
    max_sentences: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 0.9
    require_coherent: bool = True
    retries: int = 2
    seed: int = 0

    def check(self) -> None:
        """Refuse counts below one and chances outside of 0 to 1."""
        for name in ("n_candidates", "max_sentences", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 1 or more")
        if self.retries < 0:
            raise ValueError(f"retries={self.retries}; use 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}; use a number above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; use a number above 0, at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CDPOConfig(Settings):
    """How a model is trained on pairs (SENTINEL, appendix, table 10).

    Attributes:
        beta: Of DPO.
        label_smoothing: Chance that a pair is the wrong way round.
        lora_r, lora_alpha: Rank and scale of LoRA on all linear layers of the language model.
        lr: Peak learning rate; 2e-6 is the paper's for 7B (its main text says 2e-7), small models want more.
        epochs: Times through the pairs.
        batch_size: Pairs of one update.
        micro_batch_size: Pairs of one forward; gradients of several add up to an update.
        warmup_ratio: Share of updates in which the rate rises; then it falls as a cosine.
        max_grad_norm: Gradients are scaled down to this norm.
        seed: Of the order of pairs.
    """

    tags: ClassVar[Mapping[str, str]] = {"method": "c_dpo"}

    beta: float = 0.1
    label_smoothing: float = 0.0
    lora_r: int = 128
    lora_alpha: int = 256
    lr: float = 2e-6
    epochs: int = 1
    batch_size: int = 64
    micro_batch_size: int = 4
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse numbers out of range."""
        for name in ("lora_r", "lora_alpha", "epochs", "batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 1 or more")
        for name in ("beta", "lr", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}; use a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing}; use 0 to below 0.5")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}; use 0 to below 1")
