"""Recall, CHAIR and yes/no on worked examples, and the evaluation on answers that are known."""

import pytest
from eff_embedded import collages
from eff_embedded.eyes.evaluation import WORLDS, evaluate, right, tempting
from eff_embedded.eyes.scores import caption_figures, ratio, recall_by_count, score_caption, yes_no


def test_a_caption_by_hand():
    score = score_caption("Two bunnies, a fire truck and an animal near a bone.", ("rabbit", "rabbit", "dog", "tree"))
    assert score.named == {"rabbit", "fire truck", "bone"}
    assert score.wrong == {"fire truck", "bone"}
    assert score.there == {"rabbit", "dog", "tree"}


def test_figures_by_hand():
    scores = [
        score_caption("A dog and a bone.", ("dog", "tree")),
        score_caption("A cat.", ("cat",)),
        score_caption("Here is something.", ("cat", "dog", "tree")),
    ]
    figures = caption_figures(scores)
    assert (figures["recall"].value, figures["recall"].n) == (pytest.approx(2 / 6), 6)
    assert (figures["chair_i"].value, figures["chair_i"].n) == (pytest.approx(1 / 3), 3)
    assert (figures["chair_s"].value, figures["chair_s"].n) == (pytest.approx(1 / 3), 3)
    assert {n: i.value for n, i in recall_by_count(scores).items()} == {"1": 1.0, "2": 0.5, "3": 0.0}


def test_the_interval_is_that_of_a_binomial_and_does_not_depend_on_the_draw():
    hits = [1.0] * 80 + [0.0] * 20
    interval = ratio(hits, [1.0] * 100)
    assert interval.value == 0.8
    assert interval.low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.015)
    assert interval.high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.015)
    assert ratio(hits, [1.0] * 100) == interval
    assert (ratio([0.0], [0.0]).value, ratio([0.0], [0.0]).n) == (0.0, 0)
    with pytest.raises(ValueError, match="must have one length"):
        ratio([0.0], [0.0, 1.0])


@pytest.mark.parametrize(
    ("text", "said"), [("Yes.", "yes"), ("No, there is none.", "no"), ("nobody", None), ("", None), ("A dog.", None)]
)
def test_yes_and_no(text, said):
    assert yes_no(text) == said


@pytest.mark.parametrize(
    ("text", "wanted", "fits"),
    [
        ("The bunny.", "rabbit", True),
        ("The dog.", "rabbit", False),
        ("The dog and the rabbit.", "rabbit", False),
        ("In the upper left.", "upper left", True),
        ("On the left.", "upper left", False),
        ("Two.", "two", True),
        ("Yes.", "no", False),
    ],
)
def test_right_answers(text, wanted, fits):
    assert right(text, wanted) is fits


def perfect(asked):
    out = []
    for collage, text in asked:
        known = {q.text: q.answer for q in collage.questions(synonyms=0.0)}
        known |= {
            q.text: q.answer for q in collage.questions(kinds=("exists",), absent=tempting(collage), synonyms=0.0)
        }
        out.append(known.get(text) or collage.caption(synonyms=0.0).text)
    return out


def test_whoever_knows_everything_is_never_wrong():
    figures = evaluate(perfect, pictures=6)
    assert figures.keys() == WORLDS.keys()
    for found in figures.values():
        assert found["yes_no"]["value"] == found["recall"]["value"] == 1.0
        assert found["chair_i"]["value"] == found["chair_s"]["value"] == 0.0
        assert found["said_yes"]["value"] == 0.5
    others = {"class", "relation", "which", "where", "count", "count_class"}
    assert all(figures["ordinary"][kind]["value"] == 1.0 for kind in others & figures["ordinary"].keys())


def test_whoever_always_says_yes_is_right_in_half():
    figures = evaluate(lambda asked: ["Yes."] * len(asked), pictures=6, worlds=["contrary"])
    assert figures["contrary"]["yes_no"]["value"] == 0.5


def test_tempting_names_are_missing_partners():
    config = collages.CollageConfig(objects=(3, 3), pairs=collages.everyday_pairs(), contrary=True)
    partner = {a: b for x, y, _ in collages.everyday_pairs() for a, b in ((x, y), (y, x))}
    for seed in range(20):
        collage = collages.sample(seed, config)
        found = tempting(collage) or []
        assert not set(found) & set(collage.names)
        assert all(partner[name] in collage.names for name in found)
