"""What a search for heads has found, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eff_kernels.edit import Record, Settings

from eff_guidance.head_guidance.config import Path, SoftPAGConfig, Target
from eff_guidance.head_guidance.heads import Head

Written = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadHunterConfig(Settings):
    """How a search goes.

    The paper's settings: for general quality one round of 24 heads, strength 0.25, scale 3, 20 pairs of prompt and
    seed; for styles 5 rounds of 3 heads, strength 1, scale 3 (SD3) or 8 (FLUX), 5 prompts.

    Attributes:
        rounds: R; the heads of a round are tried together with all of the rounds before.
        heads_per_round: k.
        strength: u of the damage.
        scale: w of the guidance.
        target: P, see `soft_perturb_attention`.
        path: How maps are moved to P.
        start: Where in the steps guidance sets in, see `SoftPAGConfig`.
        stop: Where it ends.
    """

    rounds: int = 1
    heads_per_round: int = 24
    strength: float = 1.0
    scale: float = 3.0
    target: Target = "identity"
    path: Path = "linear"
    start: float = 0.0
    stop: float = 1.0

    def check(self) -> None:
        """Refuse counts below 1, and what `SoftPAGConfig` refuses."""
        for name in ("rounds", "heads_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 1 or more")
        self.guidance([])

    def guidance(self, heads: Sequence[Sequence[str | int]]) -> SoftPAGConfig:
        """The guidance by some heads."""
        return SoftPAGConfig(
            heads=tuple(tuple(head) for head in heads), target=self.target, strength=self.strength, path=self.path,
            scale=self.scale, start=self.start, stop=self.stop,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Round:
    """Scores of one round, as far as it went.

    Attributes:
        heads: The heads that were tried, each added to those of the rounds before.
        scores: Mean of the objective, by head; None where it is no finite number.
        passed: Whether the means of all floors were reached, by head.
    """

    heads: tuple[Written, ...] = ()
    scores: tuple[float | None, ...] = ()
    passed: tuple[bool, ...] = ()

    def ranked(self) -> list[tuple[Head, float]]:
        """Heads that passed with their scores, best first; of equal ones the one tried first."""
        rows = zip(self.heads, self.scores, self.passed, strict=True)
        fit = [(Head(*head), score) for head, score, passed in rows if passed and score is not None]  # type: ignore[arg-type]
        return sorted(fit, key=lambda row: -row[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSet(Record):
    """Heads that a search has chosen, with all scores; `save` and `load`.

    Attributes:
        heads: The chosen heads, in order of choice.
        scores: Mean objective of each when it was chosen, together with all heads of the rounds before.
        rounds: All scores of all rounds.
        config: How the search went.
        model: Class of the denoiser with its numbers of heads by layer.
        prompts: What pictures were made of.
        seeds: Seed of each prompt.
        pool: The heads that were to choose from.
        generations: How many pictures were made.
        finished: Whether all rounds are done.
    """

    config: HeadHunterConfig
    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    pool: tuple[Written, ...]
    heads: tuple[Written, ...] = ()
    scores: tuple[float, ...] = ()
    rounds: tuple[Round, ...] = ()
    generations: int = 0
    finished: bool = False

    def best(self, count: int | None = None) -> list[Head]:
        """The first heads, all by default."""
        return [Head(*head) for head in self.heads[:count]]  # type: ignore[arg-type]

    def guidance(self, count: int | None = None, **changes: Any) -> SoftPAGConfig:
        """Guidance by the first heads as in the search, with changes such as ``strength=0.5``."""
        config = self.config.guidance(self.best(count))
        return SoftPAGConfig(**{name: changes.pop(name, getattr(config, name)) for name in config.__slots__}, **changes)
