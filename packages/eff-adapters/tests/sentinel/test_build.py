import itertools
import json
import random
import warnings

import pytest
from eff_adapters.sentinel import (
    PreferencePair,
    Sentence,
    SentinelConfig,
    SentinelDataBuilder,
    intervene,
    load_pairs,
    save_pairs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ("dog", "cat", "bone", "tree", "table", "chair")


def _scripted(image, question, context, *, n, seed):
    """Sentences of one to three random objects; now and then the answer ends."""
    dice = random.Random(f"{seed} {context}")
    return [
        Sentence(
            f"There is {' and '.join('a ' + w for w in dice.sample(NAMES, dice.randint(1, 3)))}.", dice.random() < 0.1
        )
        for _ in range(n)
    ]


def _oracles(there, unsure=()):
    return [
        lambda image, names: {x: x in there or x in unsure for x in names},
        lambda image, names: {x: x in there for x in names},
    ]


@settings(max_examples=60, deadline=None)
@given(
    there=st.sets(st.sampled_from(NAMES)), unsure=st.sets(st.sampled_from(NAMES), max_size=2),
    seed=st.integers(0, 99), coherent=st.booleans(),
)  # fmt: skip
def test_contexts_invent_nothing_and_grow(there, unsure, seed, coherent):
    from eff_adapters.sentinel import ObjectTable

    table = ObjectTable(dict.fromkeys(NAMES, ()))
    config = SentinelConfig(seed=seed, require_coherent=coherent)
    built = SentinelDataBuilder(_scripted, table, _oracles(there, unsure), config).build(None, "?")
    contexts = [p.context for p in built.pairs] + [built.context]
    allowed = there | unsure
    assert all(set(table(c)) <= allowed for c in contexts)
    assert all(b.startswith(a) for a, b in itertools.pairwise(contexts))
    assert len(built.pairs) == len({p.context for p in built.pairs}) == built.counts["pairs"]
    for pair in built.pairs:
        assert set(table(pair.y_lose)) - allowed
        assert set(table(pair.y_win)) <= allowed
        assert set(table(pair.y_win)) & there
        assert built.context.startswith(f"{pair.context} {pair.y_win}".strip())
        if coherent and pair.context:
            assert set(table(pair.y_win)) & set(table(pair.context))


def _fixed(*steps):
    """A generator that says the given sentences, one list for each context."""
    asked = []

    def generate(image, question, context, *, n, seed):
        asked.append(context)
        done = len(dict.fromkeys(asked)) - 1
        return [Sentence(t) if isinstance(t, str) else t for t in steps[min(done, len(steps) - 1)]]

    generate.asked = asked
    return generate


def test_one_picture_by_hand(table):
    said = _fixed(
        ["A dog.", "A dog and a tree.", "A dog and a cat.", "A cat and a table.", "A dog."],
        ["A bone is there.", "The dog has a bone.", "The dog is a cat.", "It is late."],
        ["A bone and a cat.", Sentence("The tree.", True)],
    )
    builder = SentinelDataBuilder(said, table, _oracles({"dog", "tree", "bone"}))
    built = builder.build(None, "What?", image_id="7", image_path="7.png")
    assert [(p.context, p.y_win, p.y_lose, p.win_ended) for p in built.pairs] == [
        ("", "A dog and a tree.", "A cat and a table.", False),  # most there, and most invented
        ("A dog and a tree.", "The dog has a bone.", "The dog is a cat.", False),
        ("A dog and a tree. The dog has a bone.", "The tree.", "A bone and a cat.", True),
    ]
    assert {(p.image_id, p.image_path, p.question) for p in built.pairs} == {("7", "7.png", "What?")}
    assert built.counts["steps"] == 3
    assert built.counts["unused"] == 1
    assert built.counts["lose_words"] == 5 + 5 + 5


def test_a_sentence_out_of_the_blue_makes_no_pair_but_goes_on(table):
    said = _fixed(["A dog."], ["A tree.", "A cat."], [Sentence("The tree.", True), "A cat."])
    there = _oracles({"dog", "tree"})
    built = SentinelDataBuilder(said, table, there).build(None, "?")
    assert built.context == "A dog. A tree. The tree."
    assert [p.context for p in built.pairs] == ["A dog. A tree."]
    said = _fixed(["A dog."], ["A tree.", "A cat."], [Sentence("The tree.", True), "A cat."])
    free = SentinelDataBuilder(said, table, there, SentinelConfig(require_coherent=False)).build(None, "?")
    assert [p.context for p in free.pairs] == ["A dog.", "A dog. A tree."]


def test_no_good_sentence(table):
    said = _fixed(["A cat."])
    built = SentinelDataBuilder(said, table, _oracles({"dog"}), SentinelConfig(retries=2)).build(None, "?")
    assert len(said.asked) == 3
    assert built.pairs == []
    assert built.counts["steps"] == 1
    nothing = SentinelDataBuilder(_fixed([Sentence("", True)]), table, _oracles({"dog"})).build(None, "?")
    assert nothing.context == ""


def test_files_are_the_same_for_a_seed_and_after_a_break(table, tmp_path):
    images = [(str(i), {NAMES[i], NAMES[i + 1]}, "?") for i in range(5)]
    oracles = [lambda image, names: {x: x in image for x in names}] * 2

    def builder(generate=_scripted):
        return SentinelDataBuilder(generate, table, oracles)

    counts = builder().build_file(images, tmp_path / "a.jsonl")
    assert counts["pairs"] == len(load_pairs(tmp_path / "a.jsonl")) > 3
    builder().build_file(images, tmp_path / "b.jsonl")
    whole = (tmp_path / "a.jsonl").read_bytes()
    assert (tmp_path / "b.jsonl").read_bytes() == whole
    calls = []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return _scripted(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        builder(breaks).build_file(images, tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()
    journal = tmp_path / "c.jsonl.journal"
    done = len(journal.read_text().splitlines())
    assert done > 1
    with journal.open("a") as file:
        file.write('{"id": "4", "pa')  # cut short

    def wrong(*args, **kwargs):
        raise AssertionError

    def opened(i):
        return lambda: wrong() if i < done - 1 else images[i][1]

    again = builder().build_file([(str(i), opened(i), "?") for i in range(5)], tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == whole
    assert again == counts
    assert not journal.exists()
    (tmp_path / "d.jsonl.journal").write_text(json.dumps(SentinelConfig(seed=9).to_dict()) + "\n")
    with pytest.raises(ValueError, match="other settings"):
        builder().build_file(images, tmp_path / "d.jsonl")


def test_detectors_are_counted(table):
    with pytest.raises(ValueError, match="detectors is empty"):
        SentinelDataBuilder(_scripted, table, [])
    with pytest.warns(UserWarning, match="one detector alone"):
        SentinelDataBuilder(_scripted, table, _oracles(set())[:1])
    with warnings.catch_warnings():
        SentinelDataBuilder(_scripted, table, _oracles(set()))


def test_pairs_travel(pair, tmp_path):
    pairs = [pair(), pair(win_ended=True, image_id="3")]
    save_pairs(pairs, tmp_path / "p.jsonl")
    assert load_pairs(tmp_path / "p.jsonl") == pairs
    row = {"image_id": "1", "image_path": "x", "question": "q", "context": "", "y_win": "A.", "y_lose": "B."}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n{}\n")  # as others write them
    with pytest.raises(ValueError, match="line 2"):
        load_pairs(tmp_path / "p.jsonl")
    assert PreferencePair.from_dict(row).image_path == "x"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_win": " "}, "both need words"),
        ({"y_lose": ""}, "both need words"),
        ({"y_win": "a", "y_lose": " a"}, "same"),
    ],
)
def test_wrong_pairs(pair, changes, words):
    with pytest.raises(ValueError, match=words):
        pair(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_candidates": 0}, "n_candidates=0"),
        ({"retries": -1}, "retries=-1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        SentinelConfig(**changes)


def test_intervention_while_decoding(table):
    said = _fixed(
        ["A cat.", "A dog.", "A dog and a tree."], ["A cat and a chair.", "A cat."], [Sentence("A tree.", True)]
    )
    text = intervene(None, "?", said, table, _oracles({"dog", "tree"})[:1])
    assert text == "A dog and a tree. A cat. A tree."
    assert intervene(None, "?", _fixed([Sentence("", True)]), table, _oracles(())) == ""
    with pytest.raises(ValueError, match="one or more"):
        intervene(None, "?", said, table, [])
