"""One page about the position bias of a model."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import Record, write_whole
from torch import Tensor, nn

from eff_attention.layers import attention_types
from eff_attention.position_bias.collect import walk_layers
from eff_attention.position_bias.drawing import graph, plot
from eff_attention.position_bias.graphs import MaskSpec, centre_nodes, reach_depth
from eff_attention.position_bias.profiles import PositionProfile, position_profile
from eff_attention.position_bias.rollout import Rollout, simulate_rollout
from eff_attention.position_bias.theory import decay_profile, peak_distance

SINK_HEAD = 0.3
"""Mean weight of the first token from which on a head counts as a sink head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBiasReport(Record):
    """Means over texts of one length, for each layer or depth.

    Attributes:
        model: Name of the model.
        length: Tokens of each text.
        num_texts: How many.
        residual: Share of the residual stream in the second kind of rollout.
        kinds: Kind of each layer's attention.
        first: Share of the first token in the last one after each layer, attention alone.
        first_residual: The same with the residual stream.
        bound: What theory leaves the first token at least, from the least weight that any token gives it in each
            layer: ``1 - prod (1 - least)``.
        uniform: Share of the first token where all layers attend evenly to all that is before.
        recency: Share of the last tenth, with the residual stream.
        middle: Share of the central half, with the residual stream.
        profile: Share of each position in the last token after all layers, with the residual stream.
        sink: Mean weight that tokens give the first one in each layer.
        sink_heads: Heads of each layer in which that is more than 0.3.
        decay: Weight at each distance, mean over layers and tokens.
        slope: Of the logarithm of ``decay`` over distances from 1 to a quarter of the length, counted downwards.
    """

    model: str
    length: int
    num_texts: int
    residual: float
    kinds: tuple[str, ...]
    first: tuple[float, ...]
    first_residual: tuple[float, ...]
    bound: tuple[float, ...]
    uniform: tuple[float, ...]
    recency: tuple[float, ...]
    middle: tuple[float, ...]
    profile: tuple[float, ...]
    sink: tuple[float, ...]
    sink_heads: tuple[int, ...]
    decay: tuple[float, ...]
    slope: float

    def write_html(self, path: str | Path) -> None:
        """Write the page, with its drawings, as one file."""
        page = _page(self)
        write_whole(path, lambda file: Path(file).write_text(page, encoding="utf-8"))


def position_bias_report(
    model: nn.Module, texts: Sequence[Tensor], *, name: str = "", residual: float = 0.5
) -> PositionBiasReport:
    """Measure a model on texts of token ids [n] each, all of one length; each is read once.

    Raises:
        ValueError: there are no texts, their lengths differ, or they are shorter than 8 tokens.
    """
    lengths = {len(t) for t in texts}
    if len(lengths) != 1 or min(lengths) < 8:
        raise ValueError(f"wanted texts of one length of 8 tokens or more, got {[len(t) for t in texts][:5]}")
    looks = [_look(model, text, residual) for text in texts]
    depth, n = len(looks[0].plain), lengths.pop()

    def mean(pick: Any) -> tuple[float, ...]:
        return tuple(sum(pick(look, d) for look in looks) / len(looks) for d in range(depth))

    heads = torch.stack([look.heads for look in looks]).mean(0)  # [L, H]
    least = torch.stack([look.least for look in looks]).amin(0)
    decay = torch.stack([look.decay for look in looks]).mean(0)
    config: Any = getattr(model, "config", None)
    kinds = attention_types(config.get_text_config()) if hasattr(config, "get_text_config") else ["attention"] * depth
    return PositionBiasReport(
        model=name or type(model).__name__,
        length=n,
        num_texts=len(texts),
        residual=residual,
        kinds=tuple(kinds),
        first=mean(lambda look, d: look.plain[d].first),
        first_residual=mean(lambda look, d: look.mixed[d].first),
        bound=tuple((1 - (1 - least).cumprod(0)).tolist()),
        uniform=tuple(float(p[-1, 0]) for p in simulate_rollout(MaskSpec(), n, depth)),
        recency=mean(lambda look, d: look.mixed[d].recency),
        middle=mean(lambda look, d: look.mixed[d].middle),
        profile=tuple(torch.stack([look.mixed[-1].last_row for look in looks]).mean(0).tolist()),
        sink=tuple(heads.mean(1).tolist()),
        sink_heads=tuple((heads > SINK_HEAD).sum(1).tolist()),
        decay=tuple(decay.tolist()),
        slope=_slope(decay[1 : n // 4 + 1]),
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """One text: profiles after each layer, weight of the first token by layer and head, its least, and decay."""

    plain: list[PositionProfile]
    mixed: list[PositionProfile]
    heads: Tensor
    least: Tensor
    decay: Tensor


def _look(model: nn.Module, text: Tensor, residual: float) -> _Look:
    n = len(text)
    rollouts = Rollout(), Rollout(residual)
    profiles: tuple[list[PositionProfile], list[PositionProfile]] = ([], [])
    heads, least = [], []
    place = torch.arange(n)
    distance = (place[:, None] - place).clamp(min=0)
    decay = torch.zeros(n, dtype=torch.float64)

    def visit(layer: int, weights: Tensor) -> None:
        maps = weights[0].double().cpu()
        mean = maps.mean(0)
        mean = mean / mean.sum(-1, keepdim=True)
        heads.append(maps[:, 1:, 0].mean(1))
        least.append(mean[:, 0].min())
        decay.index_add_(0, distance.flatten(), mean.tril().flatten())
        for rollout, into in zip(rollouts, profiles, strict=True):
            rollout.add(mean)
            into.append(position_profile(rollout.value))

    walk_layers(model, text[None], None, visit)
    pairs = len(heads) * torch.arange(n, 0, -1, dtype=torch.float64)
    # The pairs above the diagonal fell on distance 0 with weight 0.
    return _Look(*profiles, torch.stack(heads), torch.stack(least), decay / pairs)


def _slope(values: Tensor) -> float:
    """How fast positive values fall: the slope of a line through their logarithms, counted downwards."""
    y = values.clamp_min(1e-12).log()
    x = torch.arange(len(y), dtype=y.dtype)
    x = x - x.mean()
    return float(-(x * y).sum() / x.square().sum().clamp_min(1e-12))


_STYLE = """body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
svg{width:100%;height:auto}td,th{padding:.1rem .6rem;text-align:right}figure{display:inline-block;margin:.5rem}
figcaption{font-size:.85rem;max-width:18rem}.wide{overflow-x:auto}
@media(max-width:40rem){svg{overflow:visible}:not(figure)>svg text{font-size:20px}}"""


def _page(r: PositionBiasReport) -> str:
    columns: dict[str, Sequence[object]] = {
        "attention": r.kinds,
        "weight of the first token": r.sink,
        "sink heads": r.sink_heads,
        "first token, attention alone": r.first,
        "first token": r.first_residual,
        "last tenth": r.recency,
        "central half": r.middle,
    }
    rows = "".join(
        f"<tr><td>{d}</td>" + "".join(f"<td>{_cell(column[d])}</td>" for column in columns.values()) + "</tr>"
        for d in range(len(r.first))
    )
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    shares = {"first token": r.first_residual, "last tenth": r.recency, "central half": r.middle}
    theory = {"measured": r.first, "at least, by theory": r.bound, "even attention": r.uniform}
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Position bias of {html.escape(r.model)}</title><style>{_STYLE}</style>
<h1>Position bias of {html.escape(r.model)}</h1>
<p>{r.num_texts} texts of {r.length} tokens; heads averaged. Influence is the product of the layers' attention
(rollout); with the residual stream each layer counts as {r.residual:g} I + {1 - r.residual:g} A.</p>
<h2>Masks as graphs</h2>
<p>An arc leads from a token to one that sees it. In deep models influence ends up in the filled nodes, from which all
others are reached. This model has {_counted(r.kinds)}.</p>{_graphs()}
<h2>Influence by depth, with the residual stream</h2>{plot(shares, "layer")}
<h2>Rollout of attention alone, against theory</h2>
<p>Share of the first token in the last one. The bound follows from the least weight that any token gives the first
one in each layer; attention without a residual stream collapses onto it, which real models do not.</p>
{plot(theory, "layer")}
<h2>Weight of the first token in each layer</h2>{plot({"mean of heads": r.sink}, "layer")}
<h2>Weight by distance</h2>
<p>Mean over layers and tokens, on a logarithmic scale; it falls by {1 - math.exp(-r.slope):.1%} a token between
distance 1 and a quarter of the length.</p>{plot({"weight": r.decay[: r.length // 2]}, "distance", log=True)}
{_decay(r)}
<h2>Share of each position in the last token, after all layers</h2>{plot({"share": r.profile}, "position", log=True)}
<h2>Figures</h2><div class="wide"><table><tr><th>layer</th>{heads}</tr>{rows}</table></div></html>"""


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _counted(kinds: Sequence[str]) -> str:
    found = [f"{_layers(kinds.count(kind))} of {kind.replace('_', ' ')}" for kind in dict.fromkeys(kinds)]
    return html.escape(" and ".join(found))


def _layers(count: int | None) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _graphs() -> str:
    shown = []
    for spec, words in [
        (MaskSpec(), "causal"),
        (MaskSpec("window", 2), "window of 2"),
        (MaskSpec("prefix", 2), "prefix of 2"),
        (MaskSpec("full"), "full"),
    ]:
        mask = spec.mask(6)
        centres = [j for part in centre_nodes(mask) for j in part]
        layers = reach_depth(mask, 0, 5)
        text = f"{words}: centre {', '.join(map(str, centres))}; token 0 reaches token 5 in {_layers(layers)}"
        shown.append(graph(mask, text))
    return "".join(shown)


def _decay(r: PositionBiasReport) -> str:
    """What that decay would do through many layers."""
    if r.slope <= 0:
        return "<p>It does not fall with distance, so that theory has no peak to tell.</p>"
    depths = [d for d in (1, 2, 4, 8) if d <= len(r.first)]
    curves = {}
    for d in depths:
        profile = decay_profile(d, r.slope, r.length // 2)
        curves[_layers(d)] = tuple((profile / profile.sum()).tolist())
    peaks = ", ".join(f"{peak_distance(d, r.slope)} through {d}" for d in depths)
    return (
        "<p>What weights with that decay alone would do through several layers: paths multiply, and the distance of "
        f"most influence moves away ({peaks} layers).</p>{plot(curves, 'distance')}"
    )
