"""The table of model classes as a part of the docs: ``uv run packages/eff-quant/tests/classes/class_page.py``."""

import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from class_table import FORMATS, STEPS, ModelClass, load_rows
from eff_quant.linears import Found
from eff_quant.mixed import as_mixed
from eff_quant.plan import plan

PAGE = Path(__file__).parents[4] / "docs" / "methods" / "quantised-classes.md"
BEGIN, END = "<!-- classes -->", "<!-- end classes -->"


def rendered(page: str, rows: Iterable[ModelClass]) -> str:
    """The page with the table as it is now between the two marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n\n" + tables(list(rows)) + "\n" + END + rest.split(END)[1]


def tables(rows: list[ModelClass]) -> str:
    """A table for each kind, and below it the refusals and notes by number."""
    parts = []
    notes: list[str] = []
    for kind in dict.fromkeys(row.kind for row in rows):
        head = ["class", "quantised", "left in float", *FORMATS]
        lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
        lines += [f"| {' | '.join(line(row, notes))} |" for row in rows if row.kind == kind]
        parts.append(f"### {kind}\n\n" + "\n".join(lines) + "\n")
    if notes:
        parts.append("\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)) + "\n")
    return "\n".join(parts)


def line(row: ModelClass, notes: list[str]) -> list[str]:
    """The cells of a class."""
    found = {name: plan(row.model, as_mixed(config)) for name, config in FORMATS.items()}
    counts = {name: sum(not f.reason for f in fs) for name, fs in found.items()}
    usual = counts["int8"]
    cells = []
    for name in FORMATS:
        words = ["yes"] if counts[name] == usual else [f"yes, {counts[name]}"]
        refused = [(step, row.refusal(name, step)) for step in STEPS]
        words += [number(f"`{step}` is refused: {text}", notes) for step, text in refused if text]
        if counts[name] != usual:
            words.append(number(f"left as well: {left(found[name], found['int8'])}", notes))
        cells.append(" ".join(words))
    named = f"`{row.name}`" + (f" {number(row.note, notes)}" if row.note else "")
    return [named, str(usual), left(found["int8"]) or "none", *cells]


def left(found: list[Found], beside: list[Found] | None = None) -> str:
    """Layers that are left, by the last parts of their names, with the reason; only those that ``beside`` has not."""
    known = {f.names[0] for f in beside or [] if f.reason}
    reasons: dict[str, dict[str, None]] = {}
    for f in found:
        if f.reason and f.names[0] not in known:
            leaf = re.sub(r"^.*?([^.]+(\.\d+)?)$", r"\1", f.names[0])
            reasons.setdefault(re.sub(r"\[[\d, ]+\] ", "", f.reason), {})[leaf] = None
    return "; ".join(f"{', '.join(f'`{n}`' for n in names)} ({reason})" for reason, names in reasons.items())


def number(note: str, notes: list[str]) -> str:
    """A reference to a note below the table."""
    if note not in notes:
        notes.append(note)
    return f"({notes.index(note) + 1})"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(rendered(text, load_rows()), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE.name}\n")
