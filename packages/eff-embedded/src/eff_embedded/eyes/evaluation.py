"""The whole evaluation of a model with eyes, on pictures that no training saw.

``python -m eff_embedded.eyes.evaluation`` prints that of the committed checkpoint as JSON.

Four worlds: one to three objects or four to six, of pairs that go together (as in the training) or never do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from eff_embedded.collages import Collage, CollageConfig, everyday_pairs, find, sample
from eff_embedded.eyes.scores import answers, caption_figures, ratio, recall_by_count, score_caption, yes_no

FIRST_SEED = 2 * 10**7
"""Collages from this seed on are for the evaluation; the training draws from seeds below half of it."""

WORLDS = {
    "ordinary": CollageConfig(objects=(1, 3), pairs=everyday_pairs()),
    "contrary": CollageConfig(objects=(1, 3), pairs=everyday_pairs(), contrary=True),
    "crowded": CollageConfig(objects=(4, 6), pairs=everyday_pairs()),
    "crowded contrary": CollageConfig(objects=(4, 6), pairs=everyday_pairs(), contrary=True),
}
DESCRIBE = "Describe the picture."

Answer = Callable[[Sequence[tuple[Collage, str]]], list[str]]
"""Answers to questions about collages."""


def evaluate(answer: Answer, *, pictures: int = 100, worlds: Sequence[str] = tuple(WORLDS)) -> dict[str, Any]:
    """Captions and yes/no questions in each world, and other questions in the ordinary one.

    Questions answered by no are about the partner of something that is there, where that partner is missing.

    Args:
        answer: The model.
        pictures: Pictures of each world.
        worlds: Names of `WORLDS`.

    Returns:
        For each world the figures of `eff_embedded.eyes.scores` as dicts: value, 95 % interval and n.
    """
    figures: dict[str, Any] = {}
    for world in worlds:
        collages = [sample(FIRST_SEED + i, WORLDS[world]) for i in range(pictures)]
        told = answer([(c, DESCRIBE) for c in collages])
        scores = [score_caption(text, c.names) for text, c in zip(told, collages, strict=True)]
        found: dict[str, Any] = {n: interval.to_dict() for n, interval in caption_figures(scores).items()}
        found["recall_by_count"] = {n: i.to_dict() for n, i in recall_by_count(scores).items()}
        found |= _yes_no(answer, collages)
        if world == "ordinary":
            found |= _others(answer, collages)
        figures[world] = found
    return figures


def _yes_no(answer: Answer, collages: Sequence[Collage]) -> dict[str, Any]:
    """Balanced questions whether something is there, at most four about a picture."""
    asked = []
    for i, collage in enumerate(collages):
        chosen = collage.questions(kinds=("exists",), absent=tempting(collage), synonyms=0.0)
        for wanted in ("yes", "no"):
            asked += [(i, q) for q in chosen if q.answer == wanted][:2]
    given = [yes_no(text) for text in answer([(collages[i], q.text) for i, q in asked])]
    by_picture = [[0.0, 0.0, 0.0] for _ in collages]
    for (i, q), said in zip(asked, given, strict=True):
        by_picture[i][0] += said == q.answer
        by_picture[i][1] += said == "yes"
        by_picture[i][2] += 1
    right, yes, count = zip(*by_picture, strict=True)
    return {"yes_no": ratio(right, count).to_dict(), "said_yes": ratio(yes, count).to_dict()}


def tempting(collage: Collage) -> list[str] | None:
    """Partners of the picture's objects that are not in it; None if there are none, so that anything may be asked."""
    partner = {a: b for x, y, _ in everyday_pairs() for a, b in ((x, y), (y, x))}
    found = [partner[n] for n in dict.fromkeys(collage.names) if n in partner and partner[n] not in collage.names]
    return found or None


def _others(answer: Answer, collages: Sequence[Collage]) -> dict[str, Any]:
    """Share of right answers to the other kinds of question; names may be synonyms."""
    asked = [(i, q) for i, c in enumerate(collages) for q in c.questions(synonyms=0.0) if q.kind != "exists"]
    asked = [pair for n, pair in enumerate(asked) if n % max(1, len(asked) // (3 * len(collages))) == 0]
    given = answer([(collages[i], q.text) for i, q in asked])
    figures = {}
    for kind in sorted({q.kind for _, q in asked}):
        hits = [float(right(text, q.answer)) for text, (_, q) in zip(given, asked, strict=True) if q.kind == kind]
        figures[kind.replace(" ", "_")] = ratio(hits, [1.0] * len(hits)).to_dict()
    return figures


def right(text: str, wanted: str) -> bool:
    """Whether an answer gives what is wanted: the same object, or the same words."""
    named = {m.name for m in find(wanted) if not m.is_class}
    if named:
        return {m.name for m in find(text) if not m.is_class} == named
    words = text.lower().strip().rstrip(".").removeprefix("in ").removeprefix("on ").removeprefix("at ")
    return words.removeprefix("the ") == wanted


def main() -> None:
    """Evaluate the committed checkpoint, or another, and print the figures as JSON."""
    import torch

    from eff_embedded.eyes.load import load_smollm2_eyes

    parser = argparse.ArgumentParser(description="Evaluate SmolLM2 with eyes and print the figures as JSON.")
    parser.add_argument("--checkpoint", default=None, help="safetensors file; by default the committed one")
    parser.add_argument("--pictures", type=int, default=100, help="pictures of each world")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_smollm2_eyes(args.checkpoint, dtype=getattr(torch, args.dtype))
    figures = evaluate(lambda asked: answers(model, processor.tokenizer, asked), pictures=args.pictures)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
