"""Code blocks of Markdown pages, shared by the tests of this folder."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

FENCE = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<reason>[^\n]*?) -->\n+)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``reason`` says why it is not run; ``line`` is that of its first line of code."""

    language: str
    code: str
    line: int
    reason: str


def parse_blocks(text: str) -> list[Block]:
    found = []
    for m in FENCE.finditer(text):
        code = re.sub(rf"^{m['indent']}", "", m["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, m.start("code")) + 1
        found.append(Block(m["language"], code, line, m["reason"] or ""))
    return found


@pytest.fixture(scope="session")
def blocks_of():
    """Function that returns the code blocks of a page or of a text."""
    return lambda page: parse_blocks(page.read_text() if isinstance(page, Path) else page)
