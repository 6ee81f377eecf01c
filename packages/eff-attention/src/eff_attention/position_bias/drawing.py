"""Curves and graphs as SVG, for pages that need no other file."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from eff_attention.position_bias.graphs import centre_nodes

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2")
_WIDTH, _HEIGHT, _LEFT, _LOW = 720.0, 260.0, 50.0, 220.0


def plot(curves: Mapping[str, Sequence[float]], across: str, *, log: bool = False) -> str:
    """Curves over 0, 1, 2, ... as one SVG; ``log`` draws the values in proportion to their logarithms."""
    values = [v for curve in curves.values() for v in curve]
    top = max(values)
    floor = max(min((v for v in values if v > 0), default=top), 1e-8) if log else 0.0

    def height(value: float) -> float:
        share = value / top if top else 0.0
        if log:
            share = math.log(max(value, floor) / floor) / math.log(top / floor) if top > floor else 0.0
        return _LOW - share * (_LOW - 20)

    parts = []
    for i, (name, curve) in enumerate(curves.items()):
        step = (_WIDTH - _LEFT - 20) / max(1, len(curve) - 1)
        points = " ".join(f"{_LEFT + j * step:.1f},{height(v):.1f}" for j, v in enumerate(curve))
        colour = _COLOURS[i % len(_COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        if len(curves) > 1:
            place = _LEFT + 10 + (_WIDTH - _LEFT - 20) / len(curves) * i
            parts.append(f'<text x="{place:.0f}" y="14" fill="{colour}" font-size="12">{html.escape(name)}</text>')
    parts += [
        f'<text x="2" y="26" font-size="12">{top:.3g}</text><text x="2" y="{_LOW}" font-size="12">{floor:.2g}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" font-size="12">{html.escape(across)}</text>',
        f'<line x1="{_LEFT}" y1="{_LOW}" x2="{_WIDTH - 20}" y2="{_LOW}" stroke="currentColor"/>',
    ]
    return f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" fill="currentColor">{"".join(parts)}</svg>'


def graph(mask: Tensor, title: str) -> str:
    """A mask as a directed graph, an arc from each token to those that see it; centre nodes are filled."""
    n = len(mask)
    gap, low = 36, 20 + 11 * n
    centres = {j for part in centre_nodes(mask) for j in part}
    parts = []
    for i in range(n):
        for j in range(n):
            if i != j and bool(mask[i, j]):
                here, there = 20 + gap * j, 20 + gap * i
                bend = 11 * abs(i - j) * (1 if i > j else -1)
                parts.append(
                    f'<path d="M{here} {low} Q{(here + there) / 2:.0f} {low - 2 * bend} {there} {low}" fill="none" '
                    'stroke="currentColor" opacity=".45"/>'
                )
    for j in range(n):
        colour = _COLOURS[2] if j in centres else "#888"
        parts.append(f'<circle cx="{20 + gap * j}" cy="{low}" r="8" fill="{colour}"/>')
        parts.append(f'<text x="{16 + gap * j}" y="{low + 4}" font-size="11" fill="#fff">{j}</text>')
    size = f'width="{40 + gap * (n - 1)}" height="{2 * low - 10}"'
    body = "".join(parts)
    return f'<figure><svg {size} style="width:auto">{body}</svg><figcaption>{html.escape(title)}</figcaption></figure>'
