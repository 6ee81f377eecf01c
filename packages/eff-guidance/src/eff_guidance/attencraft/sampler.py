"""Which concepts the next prompt names."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, get_args

from eff_guidance.attencraft.config import Concept, Sampling

_ALL = 1 / 3  # chance of all concepts together, where single ones are drawn by weight
_FLOOR = 0.1
_KEEP = 0.9


class Draw(NamedTuple):
    """One prompt.

    Attributes:
        concepts: Indices of the concepts, in the order of the prompt.
        prompt: Its text.
    """

    concepts: tuple[int, ...]
    prompt: str


class ConceptSampler:
    """Draws concepts, the same from the same seed.

    "uniform": each number of concepts is as likely, and each choice of that number; their order is random. For two
    concepts these are three cases: the one, the other, both.

    "reweighted": all with chance 1/3, else a single one in proportion to 1 / attention, where attention is the running
    mean (0.9) of what `update` was told. The form is a choice of this package; the paper names the idea.

    Args:
        concepts: What to draw from, at least one.
        mode: See above.
        template: Prompt with {} for the concepts.
        seed: Of the draws.

    Raises:
        ValueError: there are no concepts, two share a token, or the mode is unknown.
    """

    def __init__(
        self, concepts: Sequence[Concept], mode: Sampling = "uniform", *, template: str = "a photo of {}", seed: int = 0
    ) -> None:
        if not concepts or len({c.token for c in concepts}) < len(concepts):
            raise ValueError(f"concepts={[c.token for c in concepts]}; give at least one, each with a token of its own")
        if mode not in get_args(Sampling):
            raise ValueError(f"mode={mode!r}; use one of {get_args(Sampling)}")
        self.concepts, self.mode, self.template = tuple(concepts), mode, template
        self._dice = random.Random(seed)
        self._scores: list[float | None] = [None] * len(concepts)

    def update(self, scores: Mapping[int, float]) -> None:
        """Tell the mean attention inside of their masks of some concepts, by index."""
        for i, score in scores.items():
            old = self._scores[i]
            self._scores[i] = score if old is None else _KEEP * old + (1 - _KEEP) * score

    def next(self) -> Draw:
        """Draw concepts and their order."""
        chosen = self._uniform() if self.mode == "uniform" else self._reweighted()
        self._dice.shuffle(chosen)
        return self.name(chosen)

    def all(self) -> Draw:
        """All concepts in their own order, without a draw."""
        return self.name(range(len(self.concepts)))

    def name(self, chosen: Sequence[int]) -> Draw:
        """The prompt that names some concepts in this order."""
        return Draw(tuple(chosen), self.template.format(" and ".join(self.concepts[i].phrase for i in chosen)))

    def _uniform(self) -> list[int]:
        count = len(self.concepts)
        if count == 2:
            return list(self._dice.choice(((0,), (1,), (0, 1))))
        size = self._dice.randint(1, count)
        return list(self._dice.choice(list(combinations(range(count), size))))

    def _reweighted(self) -> list[int]:
        count = len(self.concepts)
        if count == 1 or self._dice.random() < _ALL:
            return list(range(count))
        known = [s for s in self._scores if s is not None]
        usual = sum(known) / len(known) if known else 1.0
        weights = [1 / max(_FLOOR, usual if s is None else s) for s in self._scores]
        return self._dice.choices(range(count), weights)

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on."""
        return {"dice": self._dice.getstate(), "scores": list(self._scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, also after a trip through JSON."""
        version, numbers, gauss = state["dice"]
        self._dice.setstate((version, tuple(numbers), gauss))
        self._scores = list(state["scores"])
