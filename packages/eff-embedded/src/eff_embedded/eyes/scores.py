"""How well a model describes collages and answers about them: recall, CHAIR, and yes/no accuracy, with intervals.

CHAIR (Rohrbach et al., arXiv 1809.02156): CHAIR_i is the share of named objects that are not in the picture, CHAIR_s
the share of captions that name one. A synonym counts as the object; a class ("an animal") counts as nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eff_embedded.collages import Collage, find
from eff_embedded.eyes.prompt import pixels, prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over pictures' counts with its 95 % bootstrap interval.

    Attributes:
        value: Sum of the numerators over sum of the denominators.
        low, high: Percentiles 2.5 and 97.5 when whole pictures are drawn again.
        n: Sum of the denominators.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float]:
        """As JSON holds it, rounded to four digits."""
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4), "n": self.n}


def ratio(hits: Sequence[float], counts: Sequence[float], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Sum of ``hits`` over sum of ``counts``, both by picture, with a bootstrap over pictures; 0 of 0 is 0.

    Raises:
        ValueError: the lengths differ, or there is no picture.
    """
    top, bottom = np.asarray(hits, float), np.asarray(counts, float)
    if top.shape != bottom.shape or not top.size:
        raise ValueError(f"hits {top.shape} and counts {bottom.shape} must have one length, 1 or more")
    if not bottom.sum():
        return Interval(value=0.0, low=0.0, high=0.0, n=0)
    chosen = np.random.default_rng(seed).integers(len(top), size=(draws, len(top)))
    sums = bottom[chosen].sum(1)
    means = top[chosen].sum(1)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(value=float(top.sum() / bottom.sum()), low=float(low), high=float(high), n=int(bottom.sum()))


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionScore:
    """What a caption names.

    Attributes:
        named: Different objects that it names.
        wrong: Those of them that are not in the picture.
        there: Different objects in the picture.
    """

    named: frozenset[str]
    wrong: frozenset[str]
    there: frozenset[str]


def score_caption(text: str, names: Sequence[str]) -> CaptionScore:
    """Compare a caption with the names of what is in the picture."""
    there = frozenset(names)
    named = frozenset(mention.name for mention in find(text) if not mention.is_class)
    return CaptionScore(named=named, wrong=named - there, there=there)


def caption_figures(scores: Sequence[CaptionScore]) -> dict[str, Interval]:
    """Recall of objects, CHAIR_i and CHAIR_s of captions."""
    ones = [1.0] * len(scores)
    return {
        "recall": ratio([len(s.there & s.named) for s in scores], [len(s.there) for s in scores]),
        "chair_i": ratio([len(s.wrong) for s in scores], [len(s.named) for s in scores]),
        "chair_s": ratio([float(bool(s.wrong)) for s in scores], ones),
    }


def recall_by_count(scores: Sequence[CaptionScore]) -> dict[str, Interval]:
    """Recall by the number of different objects in the picture."""
    counts = sorted({len(s.there) for s in scores})
    chosen = {count: [s for s in scores if len(s.there) == count] for count in counts}
    return {str(count): caption_figures(some)["recall"] for count, some in chosen.items()}


def answers(
    model: Any, tokenizer: Any, asked: Sequence[tuple[Collage, str]], *, max_tokens: int = 40, batch: int = 16
) -> list[str]:
    """Greedy answers of a LLaVA-class model with eyes to questions about collages.

    Args:
        model: From `load_smollm2_eyes`; every method that changes its attention applies.
        tokenizer: Its tokenizer.
        asked: Collage and question, in any order.
        max_tokens: Most tokens of an answer.
        batch: Questions answered at once; of unequal length they are padded on the left.
    """
    found: list[str] = [""] * len(asked)
    texts = [prompt(question, model.config.image_seq_length) for _, question in asked]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    order = sorted(range(len(asked)), key=lambda i: len(ids[i]))
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        width = max(len(ids[i]) for i in some)
        tokens = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids[i])) + ids[i] for i in some])
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in some])
        size = 14 * round(model.config.image_seq_length**0.5)
        seen = torch.stack([pixels(asked[i][0].picture, size) for i in some]).to(model.dtype)
        with torch.inference_mode():
            out: Tensor = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                pixel_values=seen,
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        for i, row in zip(some, out[:, width:], strict=True):
            found[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return found


def yes_no(text: str) -> str | None:
    """Which of "yes" and "no" an answer begins with, or None for another answer."""
    first = text.strip().lower().partition(" ")[0].strip(".,!")
    return first if first in ("yes", "no") else None
