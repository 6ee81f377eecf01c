"""The formulas beside what the official scorers gave for the same small inputs, which official_scores.json keeps.

Double words that CHAIR's program has built in ("baby elephant") are words of the table here.
"""

import json
from pathlib import Path

import pytest
from eff_attention.hallucination import (
    Vocabulary,
    amber_discriminative,
    amber_generative,
    chair,
    mmhal,
    pope_parse,
    pope_scores,
)

KEPT = json.loads(Path(__file__).with_name("official_scores.json").read_text())


def test_chair():
    kept, wanted = KEPT["chair"], KEPT["chair"]["official"]
    vocabulary = Vocabulary(kept["synonyms"])
    texts = [c["text"] for c in kept["captions"]]
    assert [vocabulary.mentions(t) for t in texts] == wanted["mentions"]
    found = chair(texts, [c["truth"] for c in kept["captions"]], vocabulary)
    assert (found.chair_i, found.chair_s) == pytest.approx((wanted["chair_i"], wanted["chair_s"]), abs=1e-12)


def test_pope():
    wanted = KEPT["pope"]["official"]
    said = [pope_parse(text) for text, _ in KEPT["pope"]["answers"]]
    assert ["yes" if s else "no" for s in said] == wanted["answers"]
    found = pope_scores(said, [label == "yes" for _, label in KEPT["pope"]["answers"]])
    assert found._asdict() == pytest.approx({n: wanted[n] for n in found._fields}, abs=1e-12)


def test_amber():
    """The official program rounds to a tenth of a percent on the way."""
    kept = KEPT["amber"]
    some = kept["descriptions"]
    found = amber_generative(
        [d["text"] for d in some],
        [d["truth"] for d in some],
        [d["tempting"] for d in some],
        Vocabulary(kept["synonyms"]),
        safe=kept["safe"],
    )
    assert {n: round(100 * v, 1) for n, v in found._asdict().items()} == kept["official"]
    asked = KEPT["amber_questions"]
    scores = amber_discriminative([a for a, _ in asked["answers"]], [t == "yes" for _, t in asked["answers"]])
    for name, value in asked["official"].items():
        assert 100 * getattr(scores, name) == pytest.approx(value, abs=0.1)


def test_mmhal():
    wanted = KEPT["mmhal"]["official"]
    assert mmhal(KEPT["mmhal"]["ratings"]) == pytest.approx((wanted["mean"], wanted["rate"]))
