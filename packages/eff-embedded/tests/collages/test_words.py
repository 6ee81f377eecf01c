"""Captions, questions and answers say what is there: the texts are read back and compared with the masks."""

import re
from collections import Counter

import numpy as np
import pytest
from eff_embedded import collages
from eff_embedded.collages import CollageConfig, english
from eff_embedded.collages.captions import PHRASES
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIGS = [
    CollageConfig(),
    CollageConfig(objects=(2, 3), overlap=1.0, most_hidden=0.6),
    CollageConfig(objects=(4, 8), repeat=0.5, object_size=(0.15, 0.6)),
    CollageConfig(objects=(1, 1)),
]
any_collage = st.builds(collages.sample, st.integers(0, 10**9), st.sampled_from(CONFIGS))
any_seed = st.integers(0, 10**9)
several = settings(max_examples=150, deadline=None)
KIND_OF = {phrase: kind for kind, phrases in PHRASES.items() for phrase in phrases}
ANY_PHRASE = "|".join(sorted(map(re.escape, KIND_OF), key=len, reverse=True))
NUMBERS = {english.number(n): n for n in range(2, 13)} | {"a": 1, "an": 1}


def box(mask):
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def holds(collage, i, kind, j):
    """The definitions, from the full masks alone."""
    a, b = collage.full[i], collage.full[j]
    (x0, y0, x1, y1), (u0, v0, u1, v1) = box(a), box(b)
    right, down = (u0 + u1 - x0 - x1) / 2, (v0 + v1 - y0 - y1) / 2
    far = collage.layout.size / 8
    overlap = (a & b).sum() >= 0.05 * min(a.sum(), b.sum())
    longer, other = max(x1 - x0, y1 - y0), max(u1 - u0, v1 - v0)
    return {
        "left of": right >= max(far, abs(down)),
        "right of": -right >= max(far, abs(down)),
        "above": down >= far and down > abs(right),
        "below": -down >= far and -down > abs(right),
        "in front of": overlap and i > j,
        "behind": overlap and i < j,
        "bigger than": longer >= 1.35 * other,
        "smaller than": other >= 1.35 * longer,
    }[kind]


def place(collage, i):
    x0, y0, x1, y1 = box(collage.full[i])
    third = collage.layout.size / 3
    column, row = int((x0 + x1) / 2 / third), int((y0 + y1) / 2 / third)
    return collages.PLACES[3 * row + column]


def only(collage, name):
    assert collage.names.count(name) == 1
    return collage.names.index(name)


def one_name(text):
    (mention,) = collages.find(text)
    return mention.name


def counted(text):
    """How many of each object a list such as "a dog, two cats and an owl" tells of."""
    found = Counter()
    for mention in collages.find(text):
        assert not mention.is_class
        found[mention.name] += NUMBERS[text[: mention.start].split()[-1].lower()]
    return found


@several
@given(any_collage)
def test_relations_are_all_that_the_definitions_give(collage):
    count = len(collage.names)
    expected = {
        (i, kind, j)
        for i in range(count)
        for j in range(count)
        for kind in collages.RELATION_KINDS
        if i != j and holds(collage, i, kind, j)
    }
    assert {tuple(r) for r in collage.relations} == expected
    assert len(collage.relations) == len(expected)


@several
@given(any_collage, any_seed, st.sampled_from([None, True, False]))
def test_captions_are_true_and_complete(collage, seed, relation):
    caption = collage.caption(seed, relation=relation)
    sentences = re.findall(r"[^.]+\.", caption.text)
    assert "".join(sentences) == caption.text
    assert len(sentences) <= 2
    assert all(s.strip()[0].isupper() for s in sentences)
    assert counted(sentences[0]) == Counter(collage.names)
    assert not re.search(r"\b[Aa] (?!uni)[aeiou]|\b[Aa]n [^aeiou]", caption.text)
    told = re.search(rf"^(.*?) (?:is )?({ANY_PHRASE}) (.*)\.$", sentences[-1])
    assert bool(told) == bool(caption.relations)
    if told:
        i, j = (only(collage, one_name(told[group])) for group in (1, 3))
        assert [(i, KIND_OF[told[2]], j)] == [tuple(r) for r in caption.relations]
        assert holds(collage, i, KIND_OF[told[2]], j)
    for i, where in caption.places:
        assert where == place(collage, i)
        assert re.search(rf"(in|at|on) the {where}\.", caption.text)
    if relation is False:
        assert not caption.relations
        assert not caption.places


def test_captions_vary_and_use_synonyms():
    collage = collages.sample(1, CollageConfig(objects=(1, 1), vocabulary=("rabbit", "truck")))
    texts = {collage.caption(seed).text for seed in range(200)}
    assert len(texts) > 10
    plain = " ".join(collage.caption(seed, synonyms=0).text for seed in range(50))
    always = " ".join(collage.caption(seed, synonyms=1).text for seed in range(50))
    assert {m.text for m in collages.find(plain)} == {collage.names[0]}
    assert {m.text for m in collages.find(always)} == set(collages.thing(collage.names[0]).synonyms)


def answer_to(collage, question):
    """The answer, worked out from the question's text and the masks."""
    names = Counter(collage.names)
    if question.kind in ("exists", "class"):
        (mention,) = collages.find(question.text)
        there = any(mention.name in (n, *collages.thing(n).classes) for n in names)
        return "yes" if there else "no"
    if question.kind == "relation":
        first, phrase, second = re.fullmatch(rf"Is (the .*) ({ANY_PHRASE}) (the .*)\?", question.text).groups()
        i, j = only(collage, one_name(first)), only(collage, one_name(second))
        assert holds(collage, i, KIND_OF[phrase], j) != holds(collage, j, KIND_OF[phrase], i)
        return "yes" if holds(collage, i, KIND_OF[phrase], j) else "no"
    if question.kind == "which":
        phrase, other = re.fullmatch(rf"What is ({ANY_PHRASE}) (the .*)\?", question.text).groups()
        j = only(collage, one_name(other))
        (found,) = [i for i in range(len(collage.names)) if holds(collage, i, KIND_OF[phrase], j)]
        return collage.names[found]
    if question.kind == "where":
        return place(collage, only(collage, one_name(question.text)))
    if question.kind in ("count", "count class"):
        name = one_name(question.text)
        return english.number(sum(c for n, c in names.items() if name in (n, *collages.thing(n).classes)))
    kind = {"front": "in front of", "bigger": "bigger than"}[question.kind]
    first, second = (only(collage, m.name) for m in collages.find(question.text))
    (right,) = [(i, j) for i, j in ((first, second), (second, first)) if holds(collage, i, kind, j)]
    return collage.names[right[0]]


@several
@given(any_collage, any_seed)
def test_answers_follow_from_the_masks(collage, seed):
    asked = collage.questions(seed)
    for question in asked:
        assert question.answer == answer_to(collage, question), question
    for kind in ("exists", "class", "relation"):
        answers = Counter(q.answer for q in asked if q.kind == kind)
        assert answers["yes"] == answers["no"]
    assert sum(q.kind == "exists" for q in asked) == 2 * len(set(collage.names))
    assert sum(q.kind == "count" for q in asked) == len(set(collage.names))


def test_every_kind_is_asked():
    config = CollageConfig(objects=(3, 4), overlap=1.0, object_size=(0.15, 0.6))
    kinds = Counter(q.kind for seed in range(100) for q in collages.sample(seed, config).questions())
    assert set(kinds) == set(collages.QUESTION_KINDS)
    assert min(kinds.values()) > 40


def test_questions_about_chosen_absent_things():
    collage = collages.sample(2, CollageConfig(objects=(2, 2), vocabulary=("dog", "cat"), repeat=0.0))
    asked = collage.questions(kinds=["exists"], absent=["bone", "dog", "ball of yarn"], synonyms=0)
    assert {q.asked[0] for q in asked if q.answer == "no"} == {"bone", "ball of yarn"}
    assert {q.asked[0] for q in asked if q.answer == "yes"} == {"dog", "cat"}
    assert {q.kind for q in asked} == {"exists"}
    with pytest.raises(ValueError, match="colour"):
        collage.questions(kinds=["colour"])


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("dog", "dogs"),
        ("mouse", "mice"),
        ("sheep", "sheep"),
        ("fox", "foxes"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("loaf of bread", "loaves of bread"),
        ("piece of furniture", "pieces of furniture"),
        ("wine glass", "wine glasses"),
        ("die", "dice"),
        ("snowman", "snowmen"),
        ("paintbrush", "paintbrushes"),
    ],
)
def test_plurals(noun, expected):
    assert english.plural(noun) == expected


def test_articles_and_lists():
    assert [english.with_article(n) for n in ("dog", "owl", "unicorn", "umbrella")] == [
        "a dog",
        "an owl",
        "a unicorn",
        "an umbrella",
    ]
    assert english.listed(["a"]) == "a"
    assert english.listed(["a", "b", "c"]) == "a, b and c"
    assert [english.number(n) for n in (0, 2, 12, 13)] == ["zero", "two", "twelve", "13"]


def test_find_reads_names_synonyms_plurals_and_classes():
    text = "Two bunnies, a Fire Truck, mice, a teddy bear and some fire; no animals, no dogma, one firefly."
    assert [(m.name, m.is_class) for m in collages.find(text)] == [
        ("rabbit", False),
        ("fire truck", False),
        ("mouse", False),
        ("teddy bear", False),
        ("fire", False),
        ("animal", True),
    ]
    assert collages.find("") == ()


def test_vocabulary_is_unambiguous():
    """No word means two things, and every word and plural is read back as what it means."""
    words = Counter(w for t in collages.things().values() for w in (t.name, *t.synonyms, *t.also))
    words.update(collages.classes().keys())
    assert [w for w, n in words.items() if n > 1] == []
    for each in collages.things().values():
        for word in (each.name, *each.synonyms, *each.also):
            for form in (word, english.plural(word)):
                assert [(m.name, m.is_class) for m in collages.find(form)] == [(each.name, False)], form
    assert 120 <= len(collages.things()) <= 250
    paired = [n for a, b, _ in collages.everyday_pairs() for n in (a, b)]
    assert set(paired) <= set(collages.things())
    assert len(set(paired)) == len(paired)
