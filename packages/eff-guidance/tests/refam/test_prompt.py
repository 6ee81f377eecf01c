"""What each token of an expression with magnets is there for."""

import pytest
from eff_guidance.refam import add_magnets
from eff_guidance.refam.words import choose_magnets, directions, noun_phrase, split_words


def test_roles_of_the_figure(t5_like):
    found = add_magnets(t5_like, "A largest orange goldfish", [".", "with", "a", "the", "pink"])
    seen = list(zip([t.strip("\u2581") for t in found.tokens], found.role, strict=True))
    assert seen[:7] == [
        ("", "special"), ("A", "stop"), ("largest", "content"), ("orange", "content"), ("gold", "content"),
        ("fish", "content"), ("</s>", "special"),
    ]  # fmt: skip
    behind = seen[7:]
    assert [role for text, role in behind if text == "</s>"] == ["special"] * 5
    assert {role for text, role in behind if text not in ("", "</s>")} == {"magnet"}
    assert [text for text, role in behind if role == "magnet"] == [".", "with", "a", "the", "pink"]
    assert found.attention_mask.all()


def test_one_text(plain_tokenizer, t5_like):
    found = add_magnets(plain_tokenizer, "the red car", ["with", "pink"], separate_eos=False)
    assert found.text == "the red car with pink"
    assert found.role == ("stop", "content", "content", "magnet", "magnet")
    assert found.input_ids.tolist() == plain_tokenizer(found.text)["input_ids"]
    with pytest.raises(ValueError, match="appends no end-of-text"):
        add_magnets(plain_tokenizer, "the red car", ["with"])
    assert add_magnets(t5_like, "the red car", ["with"], separate_eos=False).role[-1] == "special"


def test_context_noun_phrase_and_padding(t5_like):
    found = add_magnets(
        t5_like, "the man next to the red car", ["pink"], context="a dog of gold", only_noun_phrase=True, max_length=20,
        pad=True,
    )  # fmt: skip
    roles = dict(zip([t.strip("\u2581") for t in found.tokens], found.role, strict=True))
    assert [r for r in found.role if r == "context"] == ["context"] * 4
    assert [t.strip("\u2581") for t, r in zip(found.tokens, found.role, strict=True) if r == "content"] == ["man"]
    assert roles["car"] == roles["red"] == "stop"
    assert roles["<pad>"] == "pad"
    assert len(found.role) == 20
    assert found.attention_mask.tolist() == [int(r != "pad") for r in found.role]


def test_stop_words_alone_count(plain_tokenizer):
    assert add_magnets(plain_tokenizer, "the .", [], separate_eos=False).role == ("content", "stop")


def test_colours_give_way():
    assert choose_magnets("the pink dog", ("with", "pink")) == ("with", "cyan")
    assert choose_magnets("the pink and cyan dog", ("pink",)) == ("purple",)
    assert choose_magnets("pink, cyan, purple", ("with", "pink")) == ("with",)
    assert choose_magnets("a dog", ()) == ()


def test_words():
    assert [w.text for w in split_words("The dog's left ear.")] == ["The", "dog's", "left", "ear", "."]
    assert [w.text for w in noun_phrase(split_words("the man next to the red car"))] == ["the", "man"]
    assert [w.text for w in noun_phrase(split_words("of the red car"))] == ["of", "the", "red", "car"]
    assert directions("The upper left one, left of all") == ["top", "left"]


def test_what_is_refused(t5_like):
    for expression in ("", "  "):
        with pytest.raises(ValueError, match="no words"):
            add_magnets(t5_like, expression)
    with pytest.raises(ValueError, match="all occur"):
        add_magnets(t5_like, "the dog with a car", ["the", "with"])
    with pytest.raises(ValueError, match=r"takes 4"):
        add_magnets(t5_like, "the red car", max_length=4)
    with pytest.raises(ValueError, match="max_length"):
        add_magnets(t5_like, "the red car", pad=True)
    with pytest.raises(TypeError, match="fast tokenizer"):
        add_magnets(object(), "dog", [], separate_eos=False)
