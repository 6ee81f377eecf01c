"""The command ``eff-train``: finds the sub-command and runs it. Heavy libraries load when a sub-command needs them."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from eff_train.errors import Refused

COMMANDS = Path(__file__).parent / "commands"


def commands() -> dict[str, str]:
    """Sub-commands and the first line of what each does: the files in ``commands/``."""
    found = {}
    for path in sorted(COMMANDS.glob("*.py")):
        if not path.stem.startswith("_"):
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[path.stem] = doc.partition("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``eff-train`` with ``argv`` and return its exit code: 2 for a wrong use, else what the sub-command says."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage(known))
        return 0 if words else 2
    if words[0] not in known:
        sys.stderr.write(f"eff-train: no sub-command {words[0]!r}; there are {', '.join(known)}\n")
        return 2
    module = importlib.import_module(f"eff_train.commands.{words[0]}")
    try:
        return int(module.main(words[1:]))
    except Refused as error:
        sys.stderr.write(f"eff-train {words[0]}: {error}\n")
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def usage(known: dict[str, str]) -> str:
    """The text of ``eff-train --help``."""
    lines = [f"  {name:<10}{doc}" for name, doc in known.items()]
    return "\n".join(
        (
            "usage: eff-train COMMAND ...",
            "",
            "Train models by recipes. eff-train COMMAND --help says more about each:",
            "",
            *lines,
            "",
        )
    )
