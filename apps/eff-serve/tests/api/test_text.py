"""Stop strings: the same text whatever the split into tokens, and nothing of a stop string leaks."""

import itertools

from eff_serve.text import TextAssembler
from hypothesis import given
from hypothesis import strategies as st

SHORT = st.text("ab", min_size=1, max_size=4)


class Pieces:
    """Token i stands for the i-th piece of a text."""

    def __init__(self, pieces):
        self._pieces = pieces

    def push(self, token):
        return self._pieces[token]

    def flush(self):
        return ""


def first_stop(text, stops):
    """(end, start) of the stop that ends first, by brute force."""
    found = [(end, end - len(s)) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    return min(found, default=None)


def split(text, cuts):
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.text("abc", max_size=30), st.lists(SHORT, max_size=4), st.lists(st.integers(0, 99), max_size=8), st.booleans()
)
def test_stream_is_the_prefix_before_the_first_stop(text, stops, cuts, include):
    pieces = split(text, cuts)
    assembler = TextAssembler(Pieces(pieces), stop=stops, include_stop=include)
    match = first_stop(text, stops)
    want = text if match is None else text[: match[0] if include else match[1]]
    shown = ""
    for token in range(len(pieces)):
        shown += assembler.push(token)
        assert want.startswith(shown)
        if assembler.stopped:
            break
    shown += assembler.finish()
    assert shown == want
    assert assembler.stopped == (match is not None)


@given(st.text("ab", max_size=20), st.lists(SHORT, min_size=1, max_size=3), st.integers(0, 20))
def test_stops_that_end_within_min_tokens_do_not_count(text, stops, min_tokens):
    assembler = TextAssembler(Pieces(text), stop=stops, min_tokens=min_tokens)
    found = [
        (end, end - len(s)) for end in range(min_tokens + 1, len(text) + 1) for s in stops if text[:end].endswith(s)
    ]
    shown = ""
    for token in range(len(text)):
        shown += assembler.push(token)
        if assembler.stopped:
            break
    shown += assembler.finish()
    assert shown == (text[: min(found)[1]] if found else text)


def test_the_token_that_ends_is_silent_unless_asked_for():
    assert TextAssembler(Pieces(["x"]), silent={0}).push(0, last=True) == ""
    assert TextAssembler(Pieces(["x"]), silent={0}).push(0) == "x"
    assert TextAssembler(Pieces(["x"]), silent={0}, include_stop=True).push(0, last=True) == "x"
