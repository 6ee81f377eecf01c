"""Pictures with captions and questions, packed into rows: the samples of SmolLM2 with eyes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from eff_embedded import collages
from eff_embedded.collages import Collage, CollageConfig, Question
from eff_embedded.eyes.prompt import asking, pixels
from torch import Tensor

DESCRIBE = (
    "Describe the picture.",
    "What is in the picture?",
    "What do you see?",
    "Describe this image in one sentence.",
    "What does the picture show?",
    "Write a caption for this picture.",
)


MOST = {"exists": 6, "class": 2, "relation": 4}
"""Most yes/no questions of each kind about a picture, half of them answered by yes."""


@dataclass(frozen=True)
class Batch:
    """Samples of the second part of the training.

    Attributes:
        pixels: float32 [batch, 3, size, size].
        tokens: int64 [batch, rows, length]; several turns one behind the other in each row.
        places: int64 [batch, rows, length], each token's distance from the end of the picture.
        turns: int64 [batch, rows, length], number of the token's turn; -1 is padding.
        answers: bool [batch, rows, length], true where the next token belongs to an answer.
    """

    pixels: Tensor
    tokens: Tensor
    places: Tensor
    turns: Tensor
    answers: Tensor


class Patches(NamedTuple):
    """Samples of the first part: what each patch shows.

    Attributes:
        pixels: float32 [batch, 3, size, size].
        names: int64 [batch, patches]; number of the object that fills most of the patch, len(things()) for the ground,
            -1 where neither does.
    """

    pixels: Tensor
    names: Tensor


def answer_text(question: Question) -> str:
    """The answer as a sentence: "Yes.", "The dog.", "In the upper left.", "Two."."""
    if question.kind in ("which", "front", "bigger"):
        return f"The {question.answer}."
    if question.kind == "where":
        preposition = {"top": "At", "bottom": "At", "left": "On", "right": "On"}.get(question.answer, "In")
        return f"{preposition} the {question.answer}."
    return f"{question.answer.capitalize()}."


def turns_of(collage: Collage, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions with answers about a collage in random order, its caption first; yes and no equally often."""
    asked = list(collage.questions(synonyms=0.1))
    chosen = [q for q in asked if q.kind not in MOST]
    for kind, most in MOST.items():
        for answer in ("yes", "no"):
            chosen += [q for q in asked if q.kind == kind and q.answer == answer][: most // 2]
    order = rng.permutation(len(chosen))
    caption = collage.caption(synonyms=0.1).text
    describe = DESCRIBE[int(rng.integers(len(DESCRIBE)))]
    return [(describe, caption), *((chosen[i].text, answer_text(chosen[i])) for i in order)]


class Packer:
    """Fills rows of a fixed length with turns, each in the first row that has room.

    Args:
        encode: Text to token ids.
        rows: Rows of one picture.
        length: Tokens of a row.
        end: Token that ends an answer.
    """

    def __init__(self, encode: Any, rows: int, length: int, end: int) -> None:
        self.encode, self.rows, self.length, self.end = encode, rows, length, end

    def __call__(self, turns: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, places, turns and answers of one picture, each [rows, length]; see `Batch`."""
        shape = self.rows, self.length
        tokens, places = torch.full(shape, self.end), torch.zeros(shape, dtype=torch.long)
        numbers, answers = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
        filled = [0] * self.rows
        for number, (question, answer) in enumerate(turns):
            asked, told = self.encode(asking(question)), [*self.encode(answer), self.end]
            size = len(asked) + len(told)
            row = next((r for r in range(self.rows) if filled[r] + size <= self.length), None)
            if row is None:
                continue
            at = slice(filled[row], filled[row] + size)
            tokens[row, at] = torch.tensor(asked + told)
            places[row, at] = torch.arange(size)
            numbers[row, at] = number
            answers[row, at.start + len(asked) - 1 : at.stop - 1] = True
            filled[row] += size
        return tokens, places, numbers, answers


def patch_names(collage: Collage, size: int) -> Tensor:
    """What each patch of 14 x 14 pixels shows, int64 [patches]; see `Patches`."""
    grid = size // 14
    numbers = {name: i for i, name in enumerate(collages.things())}
    edge = collage.layout.size
    cells = (np.arange(edge) * grid // edge).astype(np.int64)
    patch = cells[:, None] * grid + cells[None]
    labels = np.array([len(numbers), *(numbers[n] for n in collage.names)])[collage.labels]
    counts = np.zeros((grid * grid, len(numbers) + 1), np.int64)
    np.add.at(counts, (patch.ravel(), labels.ravel()), 1)
    best = counts.argmax(1)
    things = counts[:, :-1].argmax(1)
    share = counts[np.arange(len(counts)), things] / counts.sum(1)
    names = np.where(share >= 0.3, things, np.where(counts[:, -1] == counts.sum(1), best, -1))
    return torch.from_numpy(names)


def config_of(sample: np.random.Generator, crowded: float) -> CollageConfig:
    """One to three objects, or with this chance four to six; objects that go together nearly always do."""
    objects = (4, 6) if sample.random() < crowded else (1, 3)
    return CollageConfig(objects=objects, pairs=collages.everyday_pairs(0.9))


def picture_batch(drawn: list[Collage], size: int) -> Tensor:
    """Pixels of several collages."""
    return torch.stack([pixels(c.picture, size) for c in drawn])
