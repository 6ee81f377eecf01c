"""The grammar of calls over a real vocabulary: with markers that are tokens, with thoughts, and with plain text."""

import llguidance
import pytest
from eff_serve.api.adapter import ServedTokenizer
from eff_serve.api.schema.chat import ChatRequest
from eff_serve.api.tools import grammar_of, plan_for, shows_special
from eff_serve.models.dialects import HERMES, LLAMA3, MISTRAL, SMOLLM2
from eff_serve.models.tokenizer import Tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

ARGUMENTS = '{"n": "P"}'
ONE = f'{{"name": "city", "arguments": {ARGUMENTS}}}'
TAGGED = f"<tool_call>\n{ONE}\n</tool_call>"
BARE = f'{{"name": "city", "parameters": {ARGUMENTS}}}'
BODY = {
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "city",
                "parameters": {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n"]},
            },
        }
    ],
}


@pytest.fixture(scope="module")
def marked(tmp_path_factory, smollm2):
    """SmolLM2's vocabulary with the markers of every family as tokens."""
    folder = tmp_path_factory.mktemp("marked")
    backend = Backend.from_file(str(smollm2 / "tokenizer.json"))
    backend.add_tokens([AddedToken(t, special=False) for t in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("[TOOL_CALLS]", "<|python_tag|>")])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def follows(request, smollm2):
    """``follows(folder, dialect, text, thinks, **fields)``: whether the text, in its usual tokens, may be an answer."""

    def check(folder, dialect, text, thinks=False, **fields):
        tokenizer = ServedTokenizer(Tokenizer(folder), frozenset({2}))
        body = ChatRequest.model_validate({**BODY, **fields})
        grammar = grammar_of(plan_for(body, dialect), body, tokenizer, thinks=thinks)
        source = (folder / "tokenizer.json").read_text()
        matcher = llguidance.LLMatcher(
            llguidance.LLTokenizer(source, n_vocab=tokenizer.vocab_size, eos_token=2), grammar
        )
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


@pytest.mark.parametrize(
    ("dialect", "calls"),
    [
        (HERMES, [TAGGED, f"Well. {TAGGED}", f"{TAGGED}\n{TAGGED}"]),
        (SMOLLM2, [f"<tool_call>[{ONE}]</tool_call>", f"<tool_call>[{ONE}, {ONE}]</tool_call>"]),
        (MISTRAL, [f"[TOOL_CALLS][{ONE}]", f"[TOOL_CALLS][{ONE}, {ONE}]"]),
        (LLAMA3, [BARE, f"{BARE}; {BARE}"]),
    ],
)
@pytest.mark.parametrize("tokens", [False, True])
def test_each_dialect_in_text_and_in_tokens(follows, smollm2, marked, dialect, calls, tokens):
    folder = marked if tokens else smollm2
    for text in calls:
        assert follows(folder, dialect, text), text
        assert follows(folder, dialect, text, tool_choice="required") == (not text.startswith("Well"))
        assert not follows(folder, dialect, text.replace('"n"', '"m"'))
        assert not follows(folder, dialect, text.replace("city", "town"))
        assert not follows(folder, dialect, text + " and words")
    assert follows(folder, dialect, "Just words.")
    assert not follows(folder, dialect, "Just words.", tool_choice="required")


def test_the_python_tag(follows, marked):
    assert follows(marked, LLAMA3, f"<|python_tag|>{BARE}")


@pytest.mark.parametrize("tokens", [False, True])
def test_thoughts_come_first(follows, smollm2, marked, tokens):
    folder = marked if tokens else smollm2
    thought = "<think>\nHm, a city.\n</think>\n\n"
    for text in (TAGGED, "Words."):
        assert follows(folder, HERMES, thought + text, True)
        assert follows(folder, HERMES, text, True)
        assert follows(folder, HERMES, thought.removeprefix("<think>\n") + text, "open")
    assert follows(folder, HERMES, thought + TAGGED, True, tool_choice="required")
    assert follows(folder, HERMES, TAGGED, True, tool_choice="required")
    assert follows(folder, HERMES, "Hm.</think>\n\n" + TAGGED, "open", tool_choice="required")
    assert not follows(folder, HERMES, TAGGED, "open", tool_choice="required")


def test_markers_that_are_special_tokens_are_kept_in_the_text(marked, smollm2):
    body = ChatRequest.model_validate(BODY)
    for folder, dialect, want in ((marked, MISTRAL, True), (marked, HERMES, True), (smollm2, MISTRAL, False)):
        tokenizer = ServedTokenizer(Tokenizer(folder), frozenset({2}))
        assert shows_special(plan_for(body, dialect), tokenizer, thinks=False) is want
