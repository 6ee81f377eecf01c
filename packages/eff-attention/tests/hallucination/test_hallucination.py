import pytest
from eff_attention.hallucination import (
    ChairResult,
    Vocabulary,
    amber_discriminative,
    amber_generative,
    amber_score,
    bootstrap,
    build_pope,
    chair,
    distinct_n,
    mmhal,
    pope_parse,
    pope_scores,
)

WORDS = Vocabulary({
    "dog": ["puppy"], "cat": ["kitten"], "car": ["automobile", "sports car"], "hot dog": [],
    "traffic light": ["stoplight"], "person": ["man", "woman"], "table": [], "chair": [], "bus": [],
})  # fmt: skip


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two dogs and a kitten.", ["dog", "cat"]),
        ("A hot dog on a table, next to hot dogs!", ["hot dog", "table", "hot dog"]),
        ("People wait at the traffic lights for buses; a woman waves.", ["person", "traffic light", "bus", "person"]),
        ("A SPORTS CAR, an automobile, cars", ["car", "car", "car"]),
        ("A cat sits on a chair next to a table.", ["cat", "chair", "table"]),
        ("Carpets, dogma and catalogues", []),
        ("", []),
    ],
)
def test_mentions(text, objects):
    assert WORDS.mentions(text) == objects


def test_chair_by_hand():
    result = chair(["A dog and another dog in a car"], [{"dog", "cat"}], WORDS)
    assert result.chair_i == pytest.approx(1 / 3)
    assert (result.chair_s, result.recall, result.precision, result.f1, result.length) == (1, 0.5, 0.5, 0.5, 8)
    nothing = chair(["Nice."], [{"dog"}], WORDS)
    assert (nothing.chair_i, nothing.chair_s, nothing.recall, nothing.f1) == (0, 0, 0, 0)
    both = chair(["A dog and another dog in a car", "A cat"], [{"dog", "cat"}, {"cat"}], WORDS)
    assert both.chair_i == pytest.approx(1 / 4)
    assert both.chair_s == 0.5
    assert both.recall == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, there is.", True),
        ("No, there is not.", False),
        ("There is no dog.", False),
        ("It is not there. Yes.", False),
        ("Yes. No.", True),
        ("Nothing of the kind", True),
    ],
)
def test_pope_answers(text, yes):
    assert pope_parse(text) == yes


def test_pope_scores_by_hand():
    answers = [True] * 40 + [True] * 10 + [False] * 40 + [False] * 10
    truth = [True] * 40 + [False] * 10 + [False] * 40 + [True] * 10
    assert pope_scores(answers, truth) == pytest.approx((0.8, 0.8, 0.8, 0.8, 0.5))
    assert pope_scores([False], [True]) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_questions(split):
    pictures = [{"dog", "cat", "car"}, {"dog", "cat"}, {"dog", "bus", "apple"}, {"cat"}]
    questions = build_pope(pictures, split, each=2, seed=1)
    for i, present in enumerate(pictures):
        own = [q for q in questions if q.picture == i]
        assert sum(q.answer for q in own) == sum(not q.answer for q in own) == min(2, len(present))
        assert all((q.object in present) == q.answer for q in own)
        assert len({q.object for q in own}) == len(own)
    assert all(" an apple " in q.text for q in questions if q.object == "apple")
    assert questions == build_pope(pictures, split, each=2, seed=1)
    if split == "popular":
        assert {q.object for q in questions if not q.answer and q.picture == 3} == {"dog"}
    if split == "adversarial":
        assert [q.object for q in questions if not q.answer and q.picture == 3] == ["dog"]


def test_of_objects_that_go_together_equally_often_the_more_frequent_is_asked():
    pictures = [{"dog", "cat"}, {"dog", "bus"}, {"bus"}, {"dog"}]
    asked = build_pope(pictures, "adversarial", each=1)
    assert [q.object for q in asked if q.picture == 3] == ["dog", "bus"]


def test_amber_by_hand():
    scores = amber_generative(
        ["A dog in a car with a man", "A cat"],
        [{"dog", "table"}, {"cat"}],
        [{"car", "chair"}, {"dog"}],
        WORDS,
        safe={"person"},
    )
    assert scores == pytest.approx((1 / 4, 2 / 3, 1 / 2, 1 / 3))
    questions = amber_discriminative(["No", "Yes", "No", "maybe"], [False, True, True, False])
    assert questions == pytest.approx((0.5, 0.5, 0.5, 0.5, 0.5))
    assert amber_score(scores, questions) == pytest.approx((100 - 25 + 50) / 2)
    assert mmhal([0, 3, 6, 2]) == (2.75, 0.5)


def test_repetition_and_intervals():
    assert distinct_n(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct_n([]) == 0
    result = chair(["a dog", "a car"] * 20, [{"dog"}] * 40, WORDS)
    interval = bootstrap(result.captions, lambda some: ChairResult(tuple(some)).chair_i, draws=200)
    assert interval.value == 0.5
    assert 0.3 < interval.low < 0.5 < interval.high < 0.7
    assert interval == bootstrap(result.captions, lambda some: ChairResult(tuple(some)).chair_i, draws=200)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Vocabulary({}), "at least one object"),
        (lambda: Vocabulary({"a": ["x"], "b": ["x"]}), "means both 'a' and 'b'"),
        (lambda: chair(["a"], [], WORDS), "1 captions need"),
        (lambda: chair(["a"], [{"unicorn"}], WORDS), "unicorn"),
        (lambda: pope_scores([], []), "at least one"),
        (lambda: build_pope([{"a"}], "hard"), "split='hard'"),
        (lambda: mmhal([7]), "0 to 6"),
        (lambda: bootstrap([], len), "wanted items"),
        (lambda: distinct_n(["a"], 0), "n must be"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
