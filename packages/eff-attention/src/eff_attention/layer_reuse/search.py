"""Search for a policy: exact dynamic programmes over the layers (HyLRA, arXiv 2602.00777, and its public code).

Between layers i < j, ``overlap[i, j]`` is the share of the blocks of j that i would have chosen too. A plan is a
sequence of resets, layers that choose again; the layers between take the blocks of the last reset.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eff_attention.layer_reuse.policy import Kind, LayerReusePolicy
from eff_attention.layer_reuse.profile import ReuseProfile

Matrix = NDArray[np.float64]


def search_policy(
    profile: ReuseProfile,
    objective: Literal["min_full", "max_min", "any_source"] = "min_full",
    *,
    theta: float = 0.85,
    sparsity: float = 0.9,
    compute_ratio: float = 0.3,
    force_full: Sequence[int] = (0, 1, -1),
    bridge_full: bool = True,
    head_merge: Literal["min", "mean"] | float = "min",
) -> LayerReusePolicy:
    """Choose what each layer does.

    Args:
        profile: Of the model on text like that of the use.
        objective: "min_full": the fewest resets such that every reuse overlaps by ``theta`` (the paper); of those the
            largest sum of overlaps. "max_min": with at most ``ceil(L * sparsity * compute_ratio)`` resets, and one for
            each full layer, the largest smallest overlap (the public code); of those the largest sum.
            "any_source": going up, a layer chooses again only where no layer that chose overlaps by ``theta``, and else
            takes the blocks of the best of them, however far below (ours; the run time can).
        theta: Least overlap of a reuse, for "min_full" and "any_source".
        sparsity: For "max_min": 1 - the share of layers that stay full, those with the most diffuse attention.
        compute_ratio: For "max_min": share of the others that may choose again.
        force_full: Layers that stay full in any case, negative ones from the end.
        bridge_full: Whether blocks may be taken across a full layer, and from it. The public code does neither.
        head_merge: How the overlaps of the key-value heads become one: the smallest, the mean, or a quantile.

    Returns:
        A policy; ``score`` is the smallest overlap of its reuses, ``meta`` holds the mean and the settings.

    Raises:
        ValueError: a setting is outside of its range, or no plan keeps to them.
    """
    overlap = merge_heads(profile.overlap, head_merge)
    layers = len(overlap)
    if outside := [i for i in force_full if not -layers <= i < layers]:
        raise ValueError(f"force_full names the layers {outside} of a model with {layers} layers")
    forced = {i % layers for i in force_full}
    if objective in ("min_full", "any_source"):
        if not 0 <= theta <= 1:
            raise ValueError(f"theta={theta} must lie in [0, 1]")
        search = best_sources if objective == "any_source" else fewest_resets
        plan = search(overlap, theta, forced, bridge_full)
    elif objective == "max_min":
        if not (0 <= sparsity <= 1 and 0 <= compute_ratio <= 1):
            raise ValueError(f"sparsity={sparsity} and compute_ratio={compute_ratio} must lie in [0, 1]")
        diffuse = np.argsort(-profile.ratio90.mean(axis=(0, 2)), kind="stable")
        forced |= {int(i) for i in diffuse[: math.ceil(layers * (1 - sparsity) - 1e-9)]}
        budget = math.ceil(layers * sparsity * compute_ratio - 1e-9) + len(forced - {0})
        plan = best_smallest(overlap, budget, forced, bridge_full)
    else:
        raise ValueError(f"objective={objective!r}; use 'min_full', 'max_min' or 'any_source'")
    meta: dict[str, Any] = {
        "objective": objective,
        **({"theta": theta} if objective != "max_min" else {"sparsity": sparsity, "compute_ratio": compute_ratio}),
        "bridge_full": bridge_full,
        "head_merge": head_merge,
        **profile.meta,
    }
    return to_policy(plan, overlap, forced, meta)


def merge_heads(overlap: NDArray[Any], how: Literal["min", "mean"] | float) -> Matrix:
    """One matrix [L, L] from those of all heads [H, L, L]."""
    wide = np.asarray(overlap, np.float64).round(6)  # 0.7 in float32 is to reach a theta of 0.7
    if how == "min":
        return wide.min(0)
    if how == "mean":
        return wide.mean(0)
    if isinstance(how, (int, float)) and 0 <= how <= 1:
        return np.quantile(wide, how, axis=0)
    raise ValueError(f"head_merge={how!r}; use 'min', 'mean' or a quantile from 0 to 1")


@dataclass(frozen=True, slots=True)
class Plan:
    """For each layer the layer whose blocks are current after it; itself where it was reset."""

    source: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _State:
    """The best way to a state: its value, and the sources up to here."""

    value: tuple[float, ...]
    source: tuple[int, ...]


def fewest_resets(overlap: Matrix, theta: float, forced: Iterable[int] = (), bridge: bool = True) -> Plan:
    """Fewest resets with every reuse at ``theta`` or more; then the largest sum of overlaps. O(L^2) states."""
    forced = set(forced)
    best = {0: _State((0.0, 0.0), (0,))}
    for j in range(1, len(overlap)):
        after: dict[int, _State] = {}
        for i, state in best.items():
            moves = {j: (-1.0, 0.0)}
            if j in forced:
                if bridge:
                    moves[i] = (-1.0, 0.0)
            elif overlap[i, j] >= theta and (bridge or i not in forced):
                moves[i] = (0.0, float(overlap[i, j]))
            _take(after, state, moves)
        best = after
    return Plan(max(best.values(), key=lambda s: s.value).source)


def best_sources(overlap: Matrix, theta: float, forced: Iterable[int] = (), bridge: bool = True) -> Plan:
    """Each layer takes the blocks of the best of all that chose before it; where none reaches theta, it chooses."""
    forced = set(forced)
    source = [0]
    for j in range(1, len(overlap)):
        first = 0 if bridge else 1 + max((i for i in forced if i < j), default=-1)
        choosers = [i for i, s in enumerate(source) if s == i and i >= first and j not in forced]
        best = max(choosers, key=lambda i: overlap[i, j], default=j)
        source.append(best if overlap[best, j] >= theta else j)
    return Plan(tuple(source))


def best_smallest(overlap: Matrix, budget: int, forced: Iterable[int] = (), bridge: bool = True) -> Plan:
    """At most ``budget`` resets after the first layer; the largest smallest overlap, then the largest sum.

    Two passes, since the pair is not additive: the largest smallest overlap first, then the largest sum with no overlap
    below it. Without bridges a full layer is always a reset, and so is the layer after it. (The public code makes their
    overlaps zero instead, which a plan may still take where it has no better.)
    """
    forced = set(forced)
    smallest = _within_budget(overlap, budget, forced, bridge, least=None).value[0]
    return Plan(_within_budget(overlap, budget, forced, bridge, least=smallest).source)


def _within_budget(overlap: Matrix, budget: int, forced: set[int], bridge: bool, least: float | None) -> _State:
    """Best state by the smallest overlap (``least`` None), or by the sum with no overlap below ``least``."""
    best = {(0, 0): _State((1.0,), (0,))}
    for j in range(1, len(overlap)):
        after: dict[tuple[int, int], _State] = {}
        for (i, used), state in best.items():
            options = [(j, used + 1, 1.0)] if used < budget else []
            if j in forced:
                if used < budget and bridge:
                    options.append((i, used + 1, 1.0))
            elif (bridge or i not in forced) and (least is None or overlap[i, j] >= least):
                options.append((i, used, float(overlap[i, j])))
            for source, count, gain in options:
                value = (min(state.value[0], gain),) if least is None else (state.value[0] + gain,)
                new = _State(value, (*state.source, source))
                if (source, count) not in after or value > after[source, count].value:
                    after[source, count] = new
        best = after
    if not best:
        more = "" if bridge else ", and those after them that must select again: use bridge_full=True, or more resets"
        raise ValueError(f"a budget of {budget} resets does not cover the {len(forced)} layers that stay full{more}")
    return max(best.values(), key=lambda s: s.value)


def _take(after: dict[int, _State], state: _State, moves: dict[int, tuple[float, float]]) -> None:
    for source, gain in moves.items():
        value = tuple(a + b for a, b in zip(state.value, gain, strict=True))
        if source not in after or value > after[source].value:
            after[source] = _State(value, (*state.source, source))


def to_policy(plan: Plan, overlap: Matrix, forced: set[int], meta: dict[str, Any]) -> LayerReusePolicy:
    """Kinds and sources of a plan; a reset that nobody reuses is full."""
    source = [-1 if j in forced or i == j else i for j, i in enumerate(plan.source)]
    kind: list[Kind] = []
    for j, i in enumerate(source):
        chooses = j in source and j not in forced
        kind.append("reuse" if i >= 0 else "anchor" if chooses else "full")
    reuses = [float(overlap[i, j]) for j, i in enumerate(source) if i >= 0]
    mean = float(np.mean(reuses)) if reuses else 1.0
    return LayerReusePolicy(
        tuple(kind), tuple(source), min(reuses, default=1.0), {**meta, "mean_overlap": round(mean, 6)}
    )
