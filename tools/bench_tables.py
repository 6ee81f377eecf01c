"""Write the tables of benchmark results that stand in README and docs.

A page holds a pair of comments, and this script fills in what stands between them:

    <!-- bench: packages/eff-kernels/bench/results/rms_norm.jsonl baseline=eager mode=memory threads=1 -->
    <!-- end bench -->

The path is that of a results file, from the root of the repository. ``baseline`` names the provider that speeds are
relative to (default: the first). ``rows=provider`` gives each provider a row instead of a column. Any other word
``field=text`` keeps the records whose field contains the text. Of several runs of one measurement the latest counts. A
record that was wrong (``ok`` false) or was made from uncommitted code (``dirty``) does not enter a table.

``uv run tools/bench_tables.py`` rewrites the pages; with ``--check`` it only lists the pages whose tables are stale and
exits with 1 if there are any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from eff_kernels.testing.records import Record, load_records, ratio_table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- bench: (?P<wish>[^\n]*?) -->\n).*?(<!-- end bench -->)", re.DOTALL)


class TableError(ValueError):
    """A comment asks for something that the records do not hold."""


def latest(records: Iterable[Record]) -> list[Record]:
    """The last fit record of each measurement, in the order in which the measurements were first made."""
    found: dict[tuple[str, ...], Record] = {}
    for r in records:
        if r.ok and not r.dirty:
            found[(r.spec, r.mode, str(r.threads), r.provider, r.metric, r.device)] = r
    return list(found.values())


def table(wish: str, root: Path = ROOT) -> str:
    """The Markdown that belongs between two comments.

    Args:
        wish: Text of the first comment: the results file and the words that choose from it.
        root: Where the path starts.

    Raises:
        TableError: the file, a field or a fitting record is missing, or the records are of several machines.
    """
    name, *words = wish.split()
    if not (root / name).is_file():
        raise TableError(f"{name} does not exist; run the benchmark that writes it")
    choice = dict(word.partition("=")[::2] for word in words)
    baseline, rows = choice.pop("baseline", None), choice.pop("rows", "spec")
    if rows not in ("spec", "provider"):
        raise TableError(f"rows={rows}; wanted rows=spec or rows=provider")
    unknown = set(choice) - set(Record.__dataclass_fields__)
    if unknown:
        raise TableError(f"records have no field {', '.join(sorted(unknown))}; they have {', '.join(Record.__slots__)}")
    kept = [
        r for r in latest(load_records(root / name)) if all(text in str(getattr(r, f)) for f, text in choice.items())
    ]
    if not kept:
        raise TableError(f"{name} has no record that is right, clean and fits {choice}")
    if baseline is not None and baseline not in {r.provider for r in kept}:
        raise TableError(f"{name} has no provider {baseline!r} to compare with")
    devices = sorted({r.device for r in kept})
    if len(devices) > 1:
        raise TableError(f"{name} has records of several machines, choose one with device=...: {devices}")
    turned = rows == "provider"
    return f"{ratio_table(kept, baseline, provider_rows=turned)}\n\n{conditions(kept, 'row' if turned else 'column')}"


def conditions(records: Sequence[Record], first: str = "column") -> str:
    """One line under a table: unit, machine, versions and day; speeds are relative to the ``first`` row or column."""
    newest = max(records, key=lambda r: r.date)
    units = ", ".join(sorted({f"{r.metric} in {r.unit}" for r in records}))
    return (
        f"Median {units}; in brackets the speed relative to the first {first} of numbers. {newest.device}, "
        f"torch {newest.torch}, {newest.date[:10]}, eff at {newest.commit}."
    )


def render(text: str, root: Path = ROOT) -> str:
    """A page with all its tables made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{table(m['wish'], root)}\n\n{m[3]}", text)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the tracked pages, or with ``--check`` say which ones would change."""
    listing = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    stale = []
    for page in (ROOT / name for name in listing.splitlines()):
        text = page.read_text()
        try:
            new = render(text)
        except TableError as error:
            print(f"{page.relative_to(ROOT)}: {error}")
            return 1
        if new != text:
            stale.append(page)
            if "--check" not in arguments:
                page.write_text(new)
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'stale' if '--check' in arguments else 'rewritten'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
