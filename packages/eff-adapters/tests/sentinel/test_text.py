import pytest
from eff_adapters.sentinel import ObjectTable, classify_object, judge_sentence, split_sentences
from eff_adapters.sentinel.votes import Jury


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A dog runs. It is big!  Is it? Yes", ["A dog runs.", "It is big!", "Is it?", "Yes"]),
        ("It costs 3.50 dollars. Fine.", ["It costs 3.50 dollars.", "Fine."]),
        ("Dr. Smith waves, e.g. at a cat. Done.", ["Dr. Smith waves, e.g. at a cat.", "Done."]),
        ('He says "Stop." She stops... Good.', ['He says "Stop."', "She stops...", "Good."]),
        ("one line\nno end", ["one line\nno end"]),
        ("", []),
        ("  .  ", ["."]),
        ("It is an etc.", ["It is an etc."]),
    ],
)
def test_sentences(text, wanted):
    assert split_sentences(text) == wanted


def test_objects(table):
    assert set(table("A little black cat sits on a chair next to a table.")) == {"cat", "chair", "table"}
    assert table("Two men and a kitty; the women have hot dogs, dogs and chairs.") == (
        "person", "cat", "hot dog", "dog", "chair"
    )  # fmt: skip
    assert table("A stable dogma is uncertain.") == ()


@pytest.mark.parametrize(
    ("names", "words"),
    [({}, "is empty"), ({"..": ()}, "holds no word"), ({"dog": ("pet",), "cat": ("pet",)}, "stands for 'dog' and")],
)
def test_wrong_tables(names, words):
    with pytest.raises(ValueError, match=words):
        ObjectTable(names)


def test_votes():
    wanted = {(1, 1): "factual", (0, 0): "hallucinated", (1, 0): "uncertain", (0, 1): "uncertain"}
    assert {v: classify_object([bool(x) for x in v]) for v in wanted} == wanted
    assert classify_object([True, True, True]) == "factual"
    assert classify_object([True, True, False]) == "uncertain"
    assert classify_object([False] * 3) == "hallucinated"
    with pytest.raises(ValueError, match="at least one"):
        classify_object([])


def _jury(sure=(), doubtful=()):
    return Jury(
        None,
        [
            lambda image, names: {n: n in sure or n in doubtful for n in names},
            lambda image, names: {n: n in sure for n in names},
        ],
    )


def test_sentence_rules(table):
    jury = _jury(sure=("cat", "table"), doubtful=("chair",))

    def label(text):
        return judge_sentence(text, "", table, jury).label

    assert label("A cat on a chair.") == "positive"
    assert label("A dog and a cat.") == "negative"
    assert label("A chair.") == "unused"
    assert label("It is late.") == "unused"


def test_coherence(table):
    jury = _jury(sure=("table", "chair", "dog"))
    context = "There is a table."
    assert judge_sentence("The table has chairs.", context, table, jury).coherent
    assert not judge_sentence("A dog runs.", context, table, jury).coherent


def test_each_name_is_asked_about_once():
    asked = []

    def detector(image, names):
        asked.append(names)
        return dict.fromkeys(names, True)

    jury = Jury("picture", [detector])
    jury(["dog", "cat"])
    assert jury(["cat", "dog", "cat", "bone"]) == {"cat": "factual", "dog": "factual", "bone": "factual"}
    assert asked == [["dog", "cat"], ["bone"]]
    with pytest.raises(ValueError, match="detector 0 says nothing about \\['tree'\\]"):
        Jury(None, [lambda image, names: {}])(["tree"])
