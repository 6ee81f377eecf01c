"""Pairs of sentences, and files of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eff_kernels.edit import Settings, write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair(Settings):
    """A good and a bad sentence behind the same context; the fields of the paper's data set, and two more.

    Attributes:
        image_id: Name of the image.
        image_path: Where it lies; may be empty.
        question: What was asked.
        context: Sentences before, free of invented objects; may be empty.
        y_win: The sentence to be preferred.
        y_lose: The one with an invented object.
        win_ended, lose_ended: Whether the model ended its answer behind the sentence.
    """

    image_id: str = ""
    image_path: str = ""
    question: str
    context: str = ""
    y_win: str
    y_lose: str
    win_ended: bool = False
    lose_ended: bool = False

    def check(self) -> None:
        """Refuse empty and equal sentences."""
        if not self.y_win.strip() or not self.y_lose.strip():
            raise ValueError(f"y_win={self.y_win!r}, y_lose={self.y_lose!r}; both need words")
        if self.y_win.strip() == self.y_lose.strip():
            raise ValueError(f"y_win and y_lose are the same: {self.y_win!r}")


def save_pairs(pairs: Iterable[PreferencePair], path: str | Path) -> None:
    """Write pairs as JSON, one a line."""
    text = "".join(json.dumps(pair.to_dict()) + "\n" for pair in pairs)
    write_whole(path, lambda file: Path(file).write_text(text, encoding="utf-8"))


def load_pairs(path: str | Path) -> list[PreferencePair]:
    """Read pairs, also those of the paper's data set.

    Raises:
        ValueError: a line is no pair; its number is in the message.
    """
    found = []
    for i, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(PreferencePair.from_dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {i}: {error}") from error
    return found
