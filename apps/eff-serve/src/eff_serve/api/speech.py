"""What an answer's text is made of: thoughts, words for the reader, calls of functions; found while it comes."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from eff_serve.models.dialects import PYTHON_TAG, Dialect
from eff_serve.text import undecided

_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_LONGEST_HEAD = 256  # characters, more than the longest name takes
THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Words:
    """Text of the answer, or of the thoughts before it."""

    text: str
    thought: bool = False


@dataclass(frozen=True, slots=True)
class CallPart:
    """What is added to the call number ``index``: its id and name at first, then pieces of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Part = Words | CallPart


class Thoughts:
    """Parts the thoughts that a model writes between ``<think>`` tags from its answer.

    Args:
        open: The prompt has opened the tag already.
    """

    def __init__(self, *, open: bool) -> None:
        self._state = "inside" if open else "before"
        self._held = ""
        self._fresh = True  # line breaks behind a tag are not shown

    def feed(self, text: str, *, final: bool) -> Iterator[Words]:
        """What a piece of text makes certain; ``final`` marks the last one."""
        self._held += text
        if self._state == "before":
            start = self._held.lstrip()
            if start.startswith(THINK):
                self._held, self._state, self._fresh = start[len(THINK) :], "inside", True
            elif not final and THINK.startswith(start):
                return
            else:
                self._state, self._fresh = "behind", False
        if self._state == "inside":
            thought, found, rest = self._held.partition(THOUGHT)
            keep = 0 if found or final else undecided(thought, THOUGHT)
            self._held = rest if found else thought[len(thought) - keep :]
            shown = thought if found else thought[: len(thought) - keep]
            yield from self._show(shown.rstrip() if found else shown, thought=True)
            if not found:
                return
            self._state, self._fresh = "behind", True
        shown, self._held = self._held, ""
        yield from self._show(shown, thought=False)

    def _show(self, text: str, *, thought: bool) -> Iterator[Words]:
        text = text.lstrip() if self._fresh else text
        if text:
            self._fresh = False
            yield Words(text, thought)


class Calls:
    """Finds calls in the text of an answer that follows the grammar of its dialect.

    Args:
        dialect: How the model writes calls.
        known: Names of the functions; an object of another name is text.
    """

    def __init__(self, dialect: Dialect, known: frozenset[str]) -> None:
        self._dialect, self._known = dialect, known
        self._state = "text" if dialect.start else "first"
        self._held = ""
        self._depth = 0
        self._quoted = self._escaped = False
        self.count = 0
        """Calls so far."""

    @property
    def whole(self) -> bool:
        """Whether there are calls and the last one is complete."""
        return self.count > 0 and self._state == "between"

    def feed(self, text: str, *, final: bool) -> Iterator[Part]:
        """What a piece of text makes certain; ``final`` marks the last one."""
        self._held += text
        if self._state == "first":
            self._first(final=final)
        if self._state == "text":
            yield from self._text(final=final)
        if self._state == "words" and self._held:
            yield Words(self._held)
            self._held = ""
        while self._state in ("between", "arguments"):
            if self._state == "arguments":
                yield from self._arguments()
            if self._state == "arguments" or not self._opens():
                break
            head = _HEAD.match(self._held)
            if head is None:
                break
            self._held = self._held[head.end() :]
            self._state, self._depth = "arguments", 0
            yield CallPart(self.count, _new_id(short=self._dialect.short_ids), head[1])
            self.count += 1

    def _first(self, *, final: bool) -> None:
        """Without a marker, an answer is calls if it begins with one."""
        start = self._held.lstrip().removeprefix(PYTHON_TAG).lstrip()
        head = _HEAD.match(start)
        if head is not None and head[1] in self._known:
            self._held, self._state = start, "between"
        elif final or head or len(start) > _LONGEST_HEAD or not (start[:1] == "{" or PYTHON_TAG.startswith(start)):
            self._state = "words"

    def _text(self, *, final: bool) -> Iterator[Part]:
        marker = self._dialect.start[0]
        words, found, rest = self._held.partition(marker)
        certain = words if final or found else words[: len(words) - undecided(words, marker)]
        shown = certain if final and not found else certain.rstrip()  # white space in front of a call says nothing
        self._held = rest if found else words[len(shown) :]
        self._state = "between" if found else "text"
        if shown:
            yield Words(shown)

    def _opens(self) -> bool:
        """Drop what stands in front of the next call."""
        place = self._held.find("{")
        self._held = "" if place < 0 else self._held[place:]
        return place >= 0

    def _arguments(self) -> Iterator[Part]:
        """The arguments up to the bracket that closes them; what closes the call itself is dropped with the rest."""
        if not self._depth:
            self._held = self._held.lstrip()
        end = len(self._held)
        for place, char in enumerate(self._held, 1):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._quoted = False
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state, end = "between", place
                    break
        piece, self._held = self._held[:end], self._held[end:]
        if piece:
            yield CallPart(self.count - 1, arguments=piece)


class Speech:
    """One answer's text in parts.

    Args:
        thinks: The model writes thoughts; "open" where the prompt has begun them.
        calls: Finds calls; None where no function may be called.
    """

    def __init__(self, *, thinks: bool | str = False, calls: Calls | None = None) -> None:
        self._thoughts = Thoughts(open=thinks == "open") if thinks else None
        self._calls = calls

    def feed(self, text: str, *, final: bool) -> list[Part]:
        """What a piece of text makes certain; ``final`` marks the last one."""
        words = [Words(text)] if self._thoughts is None else list(self._thoughts.feed(text, final=final))
        if self._calls is None:
            return [w for w in words if w.text]
        parts: list[Part] = []
        spoken = "".join(w.text for w in words if not w.thought)
        parts += [w for w in words if w.thought]
        if spoken or final:
            parts += self._calls.feed(spoken, final=final)
        return parts

    @property
    def called(self) -> bool:
        """Whether the answer ends in whole calls."""
        return self._calls is not None and self._calls.whole


def _new_id(*, short: bool) -> str:
    name = uuid.uuid4().hex
    return name[:9] if short else f"call_{name[:24]}"
