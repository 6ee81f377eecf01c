"""How families of models spell a call of a function, and where their chat templates take functions and results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    r"""How a model writes calls: ``start``, calls with ``between`` in the middle, ``end``.

    A call is the JSON object ``{"name": "f", "arguments": {...}}``. The pieces of the three tuples that the tokenizer
    knows as tokens of their own are written as such, all others as text.

    Attributes:
        start: What stands in front of the first call; its first piece is what tells calls from text.
        between: What stands between two calls.
        end: What stands behind the last call.
        key: Name of the arguments in the object.
        short_ids: Calls have ids of nine letters and digits, as the template insists on.
        one_call: The template takes one call a message.
    """

    start: tuple[str, ...]
    between: tuple[str, ...]
    end: tuple[str, ...]
    key: str = "arguments"
    short_ids: bool = False
    one_call: bool = False

    def spell(self, calls: list[str]) -> str:
        """The text of calls, each given as its object in JSON."""
        return "".join(self.start) + "".join(self.between).join(calls) + "".join(self.end)


HERMES = Dialect(
    start=("<tool_call>", "\n"),
    between=("\n", "</tool_call>", "\n", "<tool_call>", "\n"),
    end=("\n", "</tool_call>"),
)
"""A pair of tags around each call: Hermes, Qwen, SmolLM3, and whatever model says nothing else."""

SMOLLM2 = Dialect(start=("<tool_call>", "["), between=(", ",), end=("]", "</tool_call>"))
"""One pair of tags around a list."""

MISTRAL = Dialect(start=("[TOOL_CALLS]", "["), between=(", ",), end=("]",), short_ids=True)
"""A token in front of a list."""

LLAMA3 = Dialect(start=(), between=("; ",), end=(), key="parameters", one_call=True)
"""The bare object; the token ``<|python_tag|>`` may stand in front of it."""

PYTHON_TAG = "<|python_tag|>"


def dialect_of(template: str | None) -> Dialect:
    """The dialect that a chat template is written for; tags around each call where it shows none."""
    source = template or ""
    if "<tool_call>" in source:
        return HERMES
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if PYTHON_TAG in source or "ipython" in source:
        return LLAMA3
    return SMOLLM2 if "SmolLM" in source else HERMES
