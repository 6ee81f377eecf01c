"""Writes docs/methods/table.md from the rows of tests/methods, and docs/compositions.md from tests/compositions.

uv run tools/method_table.py           write both pages
uv run tools/method_table.py --check   say whether they are as the tables are
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "compositions"), str(ROOT / "tests" / "methods")]

WORDS = {
    "changes": "acts", "nothing": "strength 0", "leaves": "looks on", "undo": "undone", "twice": "twice",
    "stranger": "other models", "save_load": "saved", "deepcopy": "copied", "pickle": "pickled", "bf16": "bf16",
    "autocast": "autocast", "alone": "batch", "gradients": "gradients", "compiled": "compiled", "under_peft": "LoRA",
    "threads": "threads", "gqa": "GQA", "left_padding": "left padding", "generate": "generate",
    "static_cache": "static cache", "beams": "beams", "checkpointing": "checkpointing",
    "reentrant_checkpointing": "older checkpointing",
}  # fmt: skip
METHODS = """# Every method and what it holds

Each method of each package is a row; each column is a property that a test looks at on a small model. "yes": it holds.
A number: it is refused with the text below the table, which the test compares. Empty: it is not asked of such a method.
The rows lie in `tests/methods/rows`, the properties in `tests/methods/properties.py`; this page is made from them by
`tools/method_table.py`.

"""


COMPOSITIONS = """# Methods together

Pairs of methods on one model. "yes": whichever is applied first, both act; each with strength 0 is as if it were not
there, bit for bit; stored weights give what the same weights in float give; a copy of the model gives the same outputs;
and whichever is taken back first, the model is then that of the other alone, bit for bit. A number: refused in at least
one order, or not undone exactly in that order; see the notes. [Stacking methods](stack.md) walks through one stack
of four with its memory and its speed.

Two things to know: AttenCraft's projections are float weights of its own, so that its strength 0 is not compared beside
stored weights or FP8's noise; and NVFP4 is stored here without groups (`fuse_groups=()`), since layers that another
method has renamed no longer form one.

Every cell is a test in `tests/compositions`; this page is made from its tables by `tools/method_table.py`.

"""


REAL = """## On real weights

The tables above are of tiny models. These stacks and pairs are tried on the real weights of [eff-embedded](embedded.md)
as well, by `tests/compositions/test_real.py`: each method acts, and taken back it leaves the model as it was, bit for
bit; on the ViT stored weights also give what the same weights in float give. eff-studio's engine draws
with the whole stack of collage diffusion and leaves nothing of it on the pipeline.
"""


class Notes:
    """Numbered texts below a table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> str:
        """The number of a text."""
        if text not in self.texts:
            self.texts.append(text)
        return str(self.texts.index(text) + 1)

    def lines(self) -> list[str]:
        """The texts."""
        return [f"{i}. {text}" for i, text in enumerate(self.texts, 1)]


def plain(pattern: str) -> str:
    """A regular expression as a text."""
    text = re.sub(r"\\(.)", r"\1", pattern)
    return "`" + text.replace("<class '.*Sequential'>", "<class ...>").replace(".*", "...") + "`"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table of Markdown."""
    rule = ["---"] * len(head)
    return ["| " + " | ".join(line).rstrip() + " |" for line in (head, rule, *lines)]


def methods() -> str:
    """The page of methods."""
    from language import LANGUAGE
    from method_table import load_rows
    from properties import PROPERTIES, asked

    rows, parts = load_rows(), [METHODS]
    language = [f.__name__ for f in LANGUAGE]
    kinds = [
        ("Methods that change a model", [n for n in PROPERTIES if n not in (*language, "leaves")],
         [r for r in rows if r.kind in ("edit", "rewrite")]),
        ("The same on language models", language,
         [r for r in rows if r.kind in ("edit", "rewrite") and r.host == "language"]),
        ("Models", ["save_load", "deepcopy", "pickle", "bf16", "autocast", "alone", "gradients", "compiled",
                    "under_peft", "threads"], [r for r in rows if r.kind == "model"]),
        ("What looks on, and losses", ["leaves", "save_load", "deepcopy", "pickle", "bf16", "autocast", "alone",
                                       "gradients", "threads", "gqa"],
         [r for r in rows if r.kind in ("measure", "loss")]),
    ]  # fmt: skip
    for title, names, chosen in kinds:
        refused, reasons, lines = Notes(), Notes(), []
        for row in chosen:
            cells = []
            for name in names:
                if name in row.cannot:
                    cells.append(refused.number(plain(row.cannot[name])))
                elif name in row.absent:
                    cells.append("(" + chr(96 + int(reasons.number(row.absent[name]))) + ")")
                else:
                    cells.append("yes" if name in asked(row) else "")
            lines.append([row.package, row.name.replace("_", " "), *cells])
        part = [f"## {title}", "", *table(["package", "method", *(WORDS[n] for n in names)], lines), ""]
        if refused.texts:
            part += ["Refused with:", "", *refused.lines(), ""]
        if reasons.texts:
            part += ["Not asked:", "", *(f"- ({chr(97 + i)}) {text}" for i, text in enumerate(reasons.texts)), ""]
        parts.append("\n".join(part) + "\n")
    parts.append("## What the columns mean\n\n")
    parts += [f"- {WORDS[n]}: {' '.join((f.__doc__ or '').split())}\n" for n, f in PROPERTIES.items()]
    return "".join(parts).rstrip() + "\n"


def compositions() -> str:
    """The page of compositions."""
    from families import FAMILIES, STACKS

    pages = [COMPOSITIONS]
    for family in FAMILIES.values():
        names, notes = list(family.parts), Notes()
        lines = [
            [a, *(cell(family, notes, a, b) if j > i else "" for j, b in enumerate(names) if j)]
            for i, a in enumerate(names[:-1])
        ]
        text = [f"## {family.name.capitalize()}", "", *table(["", *names[1:]], lines), ""]
        if notes.texts:
            text += ["Notes:", "", *notes.lines(), ""]
        wider = [names for other, names in STACKS if other is family]
        text += ["Of three and more, the same is looked at for:", "", *("- " + ", ".join(names) for names in wider), ""]
        pages.append("\n".join(text) + "\n")
    return "".join(pages) + on_real_weights()


def on_real_weights() -> str:
    """What is looked at on real weights too."""
    from real import PAIRS, REFUSED, STACKS

    lines = [[family.name, ", ".join(names)] for family, names, _ in (*STACKS, *PAIRS)]
    lines += [[family.name, ", ".join(names) + ": refused"] for family, names in REFUSED]
    return "\n".join([REAL, *table(["model", "in the order of applying"], lines)]) + "\n"


def cell(family: Any, notes: Notes, a: str, b: str) -> str:
    """What is known of a pair, whichever is first."""
    if (a, b) not in family.pairs():
        return ""
    texts = []
    for first, then in ((a, b), (b, a)):
        if (first, then) in family.refusals:
            texts.append(f"{first}, then {then}: {plain(family.refusals[first, then])}")
        if (first, then) in family.apart:
            texts.append(f"{first}, then {then}: works; taken back, {family.apart[first, then]}")
        if (first, then) in family.held:
            texts.append(f"{first} taken back while {then} is there: {plain(family.held[first, then])}")
    return ", ".join(notes.number(text) for text in texts) or "yes"


def main() -> int:
    """Write or compare."""
    wrong = 0
    for name, page in (("docs/methods/table.md", methods()), ("docs/compositions.md", compositions())):
        path = ROOT / name
        if "--check" not in sys.argv:
            path.write_text(page)
        elif not path.exists() or path.read_text() != page:
            print(f"{name} is not what tools/method_table.py writes")
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
