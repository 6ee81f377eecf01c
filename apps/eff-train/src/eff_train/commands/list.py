"""List the recipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eff_train.registry import recipes


def main(argv: Sequence[str]) -> int:
    """Print each recipe's name and first line."""
    if argv:
        text = "usage: eff-train list\n\nList the recipes: name, and what it trains.\n"
        (sys.stdout if argv[0] in ("-h", "--help") else sys.stderr).write(text)
        return 0 if argv[0] in ("-h", "--help") else 2
    found = recipes()
    width = max(map(len, found)) + 2
    for entry in found.values():
        sys.stdout.write(f"{entry.name:<{width}}{entry.summary}\n")
    return 0
