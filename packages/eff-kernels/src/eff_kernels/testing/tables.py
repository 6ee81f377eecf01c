"""Benchmark records as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eff_kernels.testing.records import Record


def ratio_table(records: Sequence[Record], baseline: str | None = None, *, provider_rows: bool = False) -> str:
    """A Markdown table with one row for each spec and mode: median microseconds and speed relative to the baseline.

    The baseline stands first. A provider that was wrong or not checked shows as such and has no ratio. With
    ``provider_rows`` rows and columns change places, for many providers and few shapes.
    """
    first = baseline or records[0].provider
    names = list(dict.fromkeys([first, *(r.provider for r in records)]))
    rows: dict[tuple[str, str, int], dict[str, Record]] = {}
    for r in records:
        rows.setdefault((r.spec, r.mode, r.threads), {})[r.provider] = r
    lines = [["spec", "mode", "threads", *names, "roofline"]]
    for (spec, mode, threads), found in rows.items():
        base = found.get(first)
        cells = [_cell(found.get(name), base) for name in names]
        last = found.get(names[-1])
        part = "" if last is None or last.roofline is None else f"{last.roofline:.2f}"
        lines.append([spec, mode, str(threads), *cells, part])
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]  # nobody counted bytes or operations
    if provider_rows:
        lines = [list(column) for column in zip(*lines, strict=True) if any(column[1:])]
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the heading first, as a Markdown table with straight columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def _cell(record: Record | None, base: Record | None) -> str:
    if record is None:
        return ""
    if base is not record and not record.ok:
        return f"{record.p50:.1f} {'WRONG' if record.checked else 'unchecked'}"
    if record.checked and not record.ok:
        return f"{record.p50:.1f} WRONG"
    if base is None or base is record or (base.checked and not base.ok):
        return f"{record.p50:.1f}"
    return f"{record.p50:.1f} ({base.p50 / record.p50:.2f}x)"
