"""One page about the position bias of a model."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import Record, write_whole
from torch import Tensor, nn

from eff_attention.position_bias.collect import collect_rollout
from eff_attention.position_bias.profiles import PositionProfile, position_profile


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBiasReport(Record):
    """Means over texts of one length, for each depth.

    Attributes:
        model: Name of the model.
        length: Tokens of each text.
        num_texts: How many.
        residual: Share of the residual stream in the second kind of rollout.
        first: Share of the first token in the last one after each layer, attention alone.
        first_residual: The same with the residual stream.
        recency: Share of the last tenth, with the residual stream.
        middle: Share of the central half, with the residual stream.
        profile: Share of each position in the last token after all layers, with the residual stream.
    """

    model: str
    length: int
    num_texts: int
    residual: float
    first: tuple[float, ...]
    first_residual: tuple[float, ...]
    recency: tuple[float, ...]
    middle: tuple[float, ...]
    profile: tuple[float, ...]

    def write_html(self, path: str | Path) -> None:
        """Write the page: the shares by depth, and the profile of the last token, as drawings in one file."""
        page = _page(self)
        write_whole(path, lambda file: Path(file).write_text(page, encoding="utf-8"))


def position_bias_report(
    model: nn.Module, texts: Sequence[Tensor], *, name: str = "", residual: float = 0.5
) -> PositionBiasReport:
    """Measure a model on texts of token ids [n] each, all of one length.

    Raises:
        ValueError: there are no texts, or their lengths differ.
    """
    if not texts or len({len(t) for t in texts}) != 1:
        raise ValueError(f"wanted texts of one length, got {[len(t) for t in texts][:5]}")
    plain: list[list[PositionProfile]] = []
    mixed: list[list[PositionProfile]] = []
    for text in texts:
        for share, into in ((0.0, plain), (residual, mixed)):
            values = collect_rollout(model, text[None], residual=share)
            into.append([position_profile(v[0]) for v in values])
    depths = range(len(plain[0]))

    def mean(rows: Any, pick: Any) -> tuple[float, ...]:
        return tuple(sum(pick(row[d]) for row in rows) / len(rows) for d in depths)

    profile = torch.stack([row[-1].last_row for row in mixed]).mean(0)
    return PositionBiasReport(
        model=name or type(model).__name__,
        length=len(texts[0]),
        num_texts=len(texts),
        residual=residual,
        first=mean(plain, lambda p: p.first),
        first_residual=mean(mixed, lambda p: p.first),
        recency=mean(mixed, lambda p: p.recency),
        middle=mean(mixed, lambda p: p.middle),
        profile=tuple(profile.tolist()),
    )


def _page(r: PositionBiasReport) -> str:
    curves = {
        "first token, attention alone": r.first,
        "first token": r.first_residual,
        "last tenth": r.recency,
        "central half": r.middle,
    }
    rows = "".join(
        f"<tr><td>{d + 1}</td>" + "".join(f"<td>{c[d]:.3f}</td>" for c in curves.values()) + "</tr>"
        for d in range(len(r.first))
    )
    heads = "".join(f"<th>{html.escape(k)}</th>" for k in curves)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Position bias of {html.escape(r.model)}</title>
<style>body{{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}}svg{{width:100%;height:auto}}
td,th{{padding:.1rem .6rem;text-align:right}}</style>
<h1>Position bias of {html.escape(r.model)}</h1>
<p>{r.num_texts} texts of {r.length} tokens; heads averaged. Curves other than the first count the residual stream
with a share of {r.residual:g}.</p>
<h2>Share of the last token by depth</h2>{_plot(curves, "layer")}
<h2>Share of each position in the last token, after all layers</h2>{_plot({"share": r.profile}, "position", log=True)}
<table><tr><th>layer</th>{heads}</tr>{rows}</table></html>"""


_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0")


def _plot(curves: dict[str, tuple[float, ...]], across: str, *, log: bool = False) -> str:
    """Curves as one SVG."""
    width, height, left, low = 720.0, 260.0, 50.0, 220.0
    values = [v for c in curves.values() for v in c]
    floor = max(min(v for v in values if v > 0), 1e-8) if log else 0.0
    top = max(values)

    def y(v: float) -> float:
        share = (
            (torch.tensor(max(v, floor)).log() - torch.tensor(floor).log()) / (torch.tensor(top / floor).log() + 1e-12)
            if log
            else torch.tensor(v / top)
        )
        return low - float(share) * (low - 20)

    parts = []
    for i, (name, curve) in enumerate(curves.items()):
        step = (width - left - 20) / max(1, len(curve) - 1)
        points = " ".join(f"{left + j * step:.1f},{y(v):.1f}" for j, v in enumerate(curve))
        colour = _COLOURS[i % len(_COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        if len(curves) > 1:
            parts.append(
                f'<text x="{left + 10 + 170 * i:.0f}" y="14" fill="{colour}" font-size="12">{html.escape(name)}</text>'
            )
    parts.append(
        f'<text x="2" y="26" font-size="12">{top:.3g}</text><text x="2" y="{low}" font-size="12">{floor:.2g}</text>'
    )
    parts.append(f'<text x="{width / 2}" y="{height - 8}" font-size="12">{across}</text>')
    parts.append(f'<line x1="{left}" y1="{low}" x2="{width - 20}" y2="{low}" stroke="currentColor"/>')
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" fill="currentColor">{"".join(parts)}</svg>'
