"""Write the tables of benchmark results that stand in README and docs.

A page holds a pair of comments, and this script fills in what stands between them:

    <!-- bench: packages/eff-kernels/bench/results/rms_norm.jsonl baseline=eager mode=memory threads=1 -->
    <!-- end bench -->

The path is that of a results file, from the root of the repository. ``baseline`` names the provider that speeds are
relative to (default: the first). ``rows=provider`` gives each provider a row instead of a column. Any other word
``field=text`` keeps the records whose field contains the text. Of several runs of one measurement the latest counts.

Records that are no times have a table with a column for each heading, filled in by a format of Python:

    <!-- rows: apps/eff-serve/bench/results/layer_reuse_quality.jsonl threads=1 by=method,top_k
         | method = {method} | bits per byte = {bits_per_byte:.4f} | copied tokens = {copied_tokens:.1%} -->
    <!-- end rows -->

``by`` names the fields that tell one measurement from another (default: method).

A record of times enters a table without a check in one case: where the comment says ``unchecked=NAME``, for a function
of PyTorch or another library, used as it is, that speeds are relative to; the line below the table then says so. Write
%20 for a space.

A record enters a table only if it was compared in the process that made it and found right (``checked``, ``ok``), and
was made from committed code (``commit``, not ``dirty``). The line below a table names every commit in it.

``uv run tools/bench_tables.py`` rewrites the pages; with ``--check`` it only lists the pages whose tables are stale and
exits with 1 if there are any.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eff_kernels.testing.records import Record, load_records
from eff_kernels.testing.tables import markdown, ratio_table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- (?P<kind>bench|rows): (?P<wish>(?:(?!-->).)*?) -->\n).*?(<!-- end (?P=kind) -->)", re.DOTALL)


class TableError(ValueError):
    """A comment asks for something that the records do not hold."""


def latest(records: Iterable[Record], unchecked: str = "") -> list[Record]:
    """The last fit record of each measurement, in the order in which the measurements were first made."""
    found: dict[tuple[str, ...], Record] = {}
    for r in records:
        if r.publishable or (r.provider == unchecked and not r.checked and r.commit and r.dirty is False):
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
    name, choice = _asked(wish, root)
    baseline, rows = choice.pop("baseline", None), choice.pop("rows", "spec")
    unchecked = choice.pop("unchecked", "")
    if rows not in ("spec", "provider"):
        raise TableError(f"rows={rows}; wanted rows=spec or rows=provider")
    unknown = set(choice) - set(Record.__dataclass_fields__)
    if unknown:
        raise TableError(f"records have no field {', '.join(sorted(unknown))}; they have {', '.join(Record.__slots__)}")
    kept = [
        r
        for r in latest(load_records(root / name), unchecked)
        if all(text in str(getattr(r, f)) for f, text in choice.items())
    ]
    shown = {(r.spec, r.mode, r.threads) for r in kept if r.checked}
    kept = [r for r in kept if (r.spec, r.mode, r.threads) in shown]  # no row of what was not checked alone
    if not kept:
        raise TableError(f"{name} has no record that is checked, right, of a clean commit and fits {choice}")
    if unchecked and unchecked != (baseline or kept[0].provider):
        raise TableError(f"{name}: only what speeds are relative to may be unchecked, not {unchecked!r}")
    if baseline is not None and baseline not in {r.provider for r in kept}:
        raise TableError(f"{name} has no provider {baseline!r} to compare with")
    devices = sorted({r.device for r in kept})
    if len(devices) > 1:
        raise TableError(f"{name} has records of several machines, choose one with device=...: {devices}")
    turned = rows == "provider"
    return f"{ratio_table(kept, baseline, provider_rows=turned)}\n\n{conditions(kept, 'row' if turned else 'column')}"


def conditions(records: Sequence[Record], first: str = "column") -> str:
    """The line under a table: unit, machine, versions, days; speeds are relative to the ``first`` row or column."""
    units = ", ".join(sorted({f"{r.metric} in {r.unit}" for r in records}))
    bare = " and ".join(sorted({r.provider for r in records if not r.checked}))
    return (
        f"Median {units}; in brackets the speed relative to the first {first} of numbers. "
        f"{f'Results of {bare} were not compared with another. ' if bare else ''}{records[0].device}, "
        f"torch {_all(r.torch for r in records)}, {origin([(r.date, str(r.commit)) for r in records])}."
    )


def origin(made: Iterable[tuple[str, str]]) -> str:
    """The day or days and every commit of the (date, commit) pairs, in the order of time."""
    made = sorted(made)
    days = [made[0][0][:10], made[-1][0][:10]]
    return f"{' to '.join(dict.fromkeys(days))}, eff at {_all(commit for _, commit in made)}"


def _all(words: Iterable[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} and {last}" if most else last


def rows_table(wish: str, root: Path = ROOT) -> str:
    """A table of records that are no times.

    Args:
        wish: Text of the first comment: the file, what to keep, and after a bar each column as "heading = format".
        root: Where the path starts.

    Raises:
        TableError: the file, a field or a fitting record is missing, or the records are of several machines.
    """
    head, *columns = (part.strip() for part in wish.split("|"))
    name, choice = _asked(head, root)
    by = choice.pop("by", "method").split(",")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in map(json.loads, (root / name).read_text().splitlines()):
        fit = r.get("checked") and r.get("ok") and r.get("commit") and r.get("dirty") is False
        if fit and all(text in str(r.get(field, "")) for field, text in choice.items()):
            found[tuple(r.get(field) for field in by)] = r
    if not found:
        raise TableError(f"{name} has no record that is checked, right, of a clean commit and fits {choice}")
    kept = list(found.values())
    if len({r["device"] for r in kept}) > 1:
        raise TableError(f"{name} has records of several machines, choose one with device=...")
    headings, formats = zip(*(column.split(" = ", 1) for column in columns), strict=True)
    try:
        cells = [[form.format(**r) for form in formats] for r in kept]
    except (KeyError, ValueError) as error:
        raise TableError(f"{name}: a record does not fit {formats}: {error!r}") from error
    return f"{markdown([headings, *cells])}\n\n{kept[0]['device']}, {origin([(r['date'], r['commit']) for r in kept])}."


def _asked(words: str, root: Path) -> tuple[str, dict[str, str]]:
    """The file that a comment names first, and its "field=text"."""
    name, *rest = words.split()
    if not (root / name).is_file():
        raise TableError(f"{name} does not exist; run the benchmark that writes it")
    return name, {field: text.replace("%20", " ") for field, _, text in (word.partition("=") for word in rest)}


def render(text: str, root: Path = ROOT) -> str:
    """A page with all its tables made anew."""
    make = {"bench": table, "rows": rows_table}
    return BLOCK.sub(lambda m: f"{m[1]}\n{make[m['kind']](m['wish'], root)}\n\n{m[4]}", text)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the tracked pages, or with ``--check`` say which ones would change."""
    listing = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    stale, wrong = [], False
    for page in (ROOT / name for name in listing.splitlines()):
        text = page.read_text()
        try:
            new = render(text)
        except TableError as error:
            print(f"{page.relative_to(ROOT)}: {error}")
            wrong = True
            continue
        if new != text:
            stale.append(page)
            if "--check" not in arguments:
                page.write_text(new)
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'stale' if '--check' in arguments else 'rewritten'}")
    return 1 if wrong or (stale and "--check" in arguments) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
