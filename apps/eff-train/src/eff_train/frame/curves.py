"""Curves as inline SVG: one panel for a metric, a line for what training saw, marks for what evaluations gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 28
MOST_POINTS = 400


def panel(series: Mapping[str, Points], title: str) -> str:
    """An SVG with one line for each series over the number of updates. ``evaluation`` gets marks as well.

    Values that are no finite numbers are left out. Where positive values span more than a factor of 100 the axis is
    logarithmic.
    """
    series = {name: thin([(x, y) for x, y in points if math.isfinite(y)]) for name, points in series.items()}
    values = [y for points in series.values() for _, y in points]
    if not values:
        return ""
    steps = [x for points in series.values() for x, _ in points]
    log = min(values) > 0 and max(values) > 100 * min(values)
    y_ticks = log_ticks(min(values), max(values)) if log else ticks(min(values), max(values))
    x_ticks = ticks(min(0, *steps), max(steps))
    low, high = min(*values, y_ticks[0]), max(*values, y_ticks[-1])

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_ticks[0]) / ((max(*steps, x_ticks[-1]) - x_ticks[0]) or 1)

    def down(y: float) -> float:
        scale = math.log if log else float
        share = (scale(y) - scale(low)) / ((scale(high) - scale(low)) or 1)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    parts += [f'<text x="{across(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:.6g}</text>' for x in x_ticks]
    for name, points in series.items():
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        if name == "evaluation":
            parts += [
                f'<circle class="{name}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3">'
                f"<title>update {x:g}: {y:.6g}</title></circle>"
                for x, y in points
            ]
    return "".join([*parts, "</svg>"])


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most ``most`` points: neighbours are averaged, so that a peak is lower but not lost."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that start at or below ``low`` and lie within reach of ``high``."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    first = math.floor(low / step + 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [round((first + i) * step, 12) for i in range(count + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from at or below ``low`` up to ``high``, at most about six."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    stride = max(1, math.ceil((last - first) / 5))
    return [10.0**e for e in range(first, last + 1, stride)]
