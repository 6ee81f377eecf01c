"""Toy tokenizers that need no files: words with a mark of the space before them, and an end token as T5's."""

import pytest


def make_tokenizer(*, eos):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = "A a the largest orange gold fish dog left of red car with to pink cyan purple . man next 0"
    words = text.split()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -3.0)]
    pieces += [("\u2581" + w, -2.0) for w in words if w != "A"] + [(w, -2.5) for w in words]
    pieces += [(c, -8.0) for c in "abcdefghijklmnopqrstuvwxyz" if c != "a"]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    if eos:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def t5_like():
    """Appends ``</s>``; "A" is two pieces, the mark of the space and the letter; "goldfish" is two pieces."""
    return make_tokenizer(eos=True)


@pytest.fixture
def plain_tokenizer():
    """Appends nothing."""
    return make_tokenizer(eos=False)
