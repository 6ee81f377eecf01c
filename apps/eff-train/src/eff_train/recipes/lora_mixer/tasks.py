"""Three small tasks with one right answer each: sums, words backwards, and what kind of thing a word names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eff_train.frame import HELD_OUT, generator


class Question(NamedTuple):
    """What is asked and the only right answer, which begins with a space."""

    prompt: str
    answer: str


class Batch(NamedTuple):
    """Questions with their answers as tokens, padded on the right.

    Attributes:
        ids: int64 [B, T].
        mask: Whether a place is no padding, bool [B, T].
        targets: The token that follows where that is one of the answer, else -100, int64 [B, T].
        tasks: Numbers of `TASKS`, int64 [B].
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor
    tasks: Tensor


@cache
def words() -> tuple[tuple[tuple[str, str], ...], ...]:
    """Names of things with their kinds, to learn from and to be judged by; all names of a thing are on one side."""
    from eff_embedded import collages

    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    known = [t for t in collages.things().values() if t.classes]
    for number, thing in enumerate(known):
        side = sides[number % 4 == 3]
        side.extend((name, thing.classes[-1]) for name in (thing.name, *thing.synonyms, *thing.also))
    return tuple(map(tuple, sides))


def _sum(dice: np.random.Generator, held_out: bool) -> Question:
    while True:  # one pair of numbers in five is never learned from
        a, b = (int(n) for n in dice.integers(10, 100, 2))
        if ((7 * a + 3 * b) % 5 == 0) == held_out:
            return Question(f"{a} + {b} =", f" {a + b}")


def _backwards(dice: np.random.Generator, held_out: bool) -> Question:
    names = [name for name, _ in words()[held_out] if " " not in name]
    chosen = [names[i] for i in dice.choice(len(names), 4, replace=False)]
    return Question(f"Backwards: {' '.join(chosen)} =", f" {' '.join(reversed(chosen))}")


def _kind(dice: np.random.Generator, held_out: bool) -> Question:
    some = words()[held_out]
    name, kind = some[int(dice.integers(len(some)))]
    return Question(f"Kind of {name}:", f" {kind}")


TASKS: dict[str, Callable[[np.random.Generator, bool], Question]] = {
    "sum": _sum,
    "backwards": _backwards,
    "kind": _kind,
}


def question(seed: int, sample: int) -> tuple[int, Question]:
    """The task and question of a number; tasks take turns. Numbers from `HELD_OUT` on are for judging."""
    task = sample % len(TASKS)
    return task, list(TASKS.values())[task](generator(seed, sample), sample >= HELD_OUT)


def encode(tokenizer: Any, questions: Sequence[tuple[int, Question]]) -> Batch:
    """Questions and answers as one batch; every answer ends with the token that ends a turn."""
    end = tokenizer.eos_token_id
    rows = [_tokens(tokenizer, q.prompt) for _, q in questions]
    answers = [[*_tokens(tokenizer, q.answer), end] for _, q in questions]
    width = max(len(r) + len(a) for r, a in zip(rows, answers, strict=True)) - 1
    ids, targets = torch.full((len(rows), width), end), torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        both = [*row, *answer]
        ids[i, : len(both) - 1] = torch.tensor(both[:-1])
        targets[i, len(row) - 1 : len(both) - 1] = torch.tensor(answer)
        mask[i, : len(both) - 1] = True
    return Batch(ids, mask, targets, torch.tensor([task for task, _ in questions]))


def batch_of(tokenizer: Any, seed: int, samples: range) -> Batch:
    """The batch of some numbers."""
    return encode(tokenizer, [question(seed, s) for s in samples])


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
