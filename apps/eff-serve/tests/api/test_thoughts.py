"""Thoughts between tags come apart from the answer."""

import pytest
from eff_serve.api.speech import CallPart, Calls, Speech, Words
from eff_serve.models.dialects import HERMES

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def said(text, step, thinks, calls=False):
    """(thoughts, words, names of calls) of a text that comes in pieces of ``step`` characters."""
    speech = Speech(thinks=thinks, calls=Calls(HERMES, frozenset({"f"})) if calls else None)
    parts = [p for i in range(0, len(text), step) for p in speech.feed(text[i : i + step], final=False)]
    parts += speech.feed("", final=True)
    words = [p for p in parts if isinstance(p, Words)]
    return (
        "".join(p.text for p in words if p.thought),
        "".join(p.text for p in words if not p.thought),
        [p.name for p in parts if isinstance(p, CallPart) and p.name],
    )


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "thinks", "want"),
    [
        ("<think>\nLet me see.</think>\n\nFour.", True, ("Let me see.", "Four.")),
        ("\n<think>a < b</think>c", True, ("a < b", "c")),
        ("<think></think>x", True, ("", "x")),
        ("Let me see.\n</think>\n\nFour.", "open", ("Let me see.", "Four.")),
        ("never closed", "open", ("never closed", "")),
        ("Four. <think>late</think>", True, ("", "Four. <think>late</think>")),
        ("<thin", True, ("", "<thin")),
        ("<think>a</think>b", False, ("", "<think>a</think>b")),
    ],
)
def test_thoughts_and_words(text, thinks, want, step):
    thoughts, words, _ = said(text, step, thinks)
    assert (thoughts.rstrip(), words) == want


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_a_call_behind_thoughts_but_none_inside_them(step):
    found = said(f"<think>I may write {CALL}.</think>\n\n{CALL}", step, True, calls=True)
    assert found == (f"I may write {CALL}.", "", ["f"])


@pytest.mark.parametrize("stream", [False, True])
def test_over_http(chat, engine, tokenizer, events, stream):
    tokenizer.thinks = True
    engine.text = "<think>\nOne and one.\n</think>\n\nTwo."
    response = chat(stream=stream)
    if stream:
        deltas = [e["choices"][0]["delta"] for e in events(response)[:-1]]
        thoughts = "".join(d.get("reasoning_content") or "" for d in deltas)
        words = "".join(d.get("content") or "" for d in deltas)
        assert thoughts.rstrip() == "One and one."
    else:
        message = response.json()["choices"][0]["message"]
        words = message["content"]
        assert message["reasoning_content"] == "One and one."
    assert words == "Two."


def test_thoughts_go_back_to_the_template(chat, tokenizer):
    turns = [
        {"role": "assistant", "content": "Two.", "reasoning_content": "One and one."},
        {"role": "user", "content": "?"},
    ]
    assert chat(messages=turns).status_code == 200
    assert tokenizer.laid_out["messages"][0]["reasoning_content"] == "One and one."
