"""Which heads to calibrate: try them one at a time on samples of a task (section on head filtering of the paper)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from eff_kernels.edit import Record
from numpy.typing import NDArray

from eff_attention.sink_calibration.apply import apply_act, treated_heads
from eff_attention.sink_calibration.config import ACTConfig
from eff_attention.sink_calibration.identity import model_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = Mapping[str, Sequence[float]]
_DRAWS = 1000


@dataclass(frozen=True)
class HeadTrial:
    """What calibrating one head alone did.

    Attributes:
        layer: Its layer.
        head: Its number.
        gain: Change of the mean score over data sets.
        low: Lower end of the 95 % interval of the gain, by a paired bootstrap over samples.
        high: Its upper end.
        p: Share of the draws, plus one, in which there is no gain.
    """

    layer: int
    head: int
    gain: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSelection(Record):
    """Result of a search, and what is kept of one that was broken off.

    Attributes:
        base: Settings that each head was tried with.
        baseline: Scores of the samples without calibration, by data set.
        candidates: Heads to try, (layer, head), in this order.
        trials: Heads tried so far.
        min_gain: A head is chosen if it gains more than this.
        max_heads: At most so many are chosen, those with the largest gains; None for no limit.
        model_hash: Of the model.
    """

    base: ACTConfig
    baseline: Mapping[str, tuple[float, ...]]
    candidates: tuple[tuple[int, int], ...]
    trials: tuple[HeadTrial, ...]
    min_gain: float
    max_heads: int | None
    model_hash: str

    @property
    def ranked(self) -> list[HeadTrial]:
        """The trials, largest gain first."""
        return sorted(self.trials, key=lambda t: (-t.gain, t.layer, t.head))

    @property
    def heads(self) -> dict[int, tuple[int, ...]]:
        """The chosen heads, by layer."""
        chosen = [t for t in self.ranked if t.gain > self.min_gain][: self.max_heads]
        layers = sorted({t.layer for t in chosen})
        return {layer: tuple(sorted(t.head for t in chosen if t.layer == layer)) for layer in layers}

    @property
    def config(self) -> ACTConfig:
        """Settings for `apply_act` that treat the chosen heads."""
        return dataclasses.replace(self.base, heads=self.heads, model_hash=self.model_hash)


def search_heads(
    model: PreTrainedModel,
    evaluate: Callable[[PreTrainedModel], Scores],
    config: ACTConfig | None = None,
    *,
    min_gain: float = 0.0,
    max_heads: int | None = None,
    max_evals: int | None = None,
    path: str | Path | None = None,
    resume: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> HeadSelection:
    """Try each head of ``config`` alone and keep those that help.

    The gain of a head is noise where samples are few (900 of them have a standard error of 1.6 points): measure the
    result once more on samples that the search has not seen.

    Args:
        model: A decoder, see `apply_act`; it is left as it was.
        evaluate: Runs the model and returns a score of each sample by data set, such as 1.0 for a right answer. The
            mean over samples is taken for each data set, then over data sets. It must be deterministic.
        config: Settings; ``layers`` or ``heads`` bound the search.
        min_gain: See `HeadSelection`.
        max_heads: See `HeadSelection`.
        max_evals: Try only so many heads, those whose sinks get the most weight on the samples (one more evaluation).
        path: Keeps the search in this file after each head.
        resume: Whether to go on with a search that ``path`` holds.
        progress: Called with the heads tried and their number.

    Raises:
        ValueError: a number is out of range, ``evaluate`` returns nothing, other samples than before or numbers that
            are not finite, or ``path`` holds a search of another model or with other settings.
    """
    config = config or ACTConfig()
    for name, limit in (("max_heads", max_heads), ("max_evals", max_evals)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit}; use at least 1, or None")
    heads = treated_heads(model, config)
    found = model_hash(model)
    file = None if path is None else Path(path)
    if file is not None and resume and file.exists():
        state = _resumed(HeadSelection.load(file), config, heads, found, max_evals, file)
        state = dataclasses.replace(state, min_gain=min_gain, max_heads=max_heads)
    else:
        baseline = _scores(evaluate(model), None)
        candidates = _candidates(model, evaluate, config, heads, max_evals)
        state = HeadSelection(
            base=config, baseline=baseline, candidates=candidates, trials=(),
            min_gain=min_gain, max_heads=max_heads, model_hash=found,
        )  # fmt: skip
    for layer, head in state.candidates[len(state.trials) :]:
        with apply_act(model, dataclasses.replace(config, heads={layer: (head,)}, model_hash=None)):
            scores = _scores(evaluate(model), state.baseline)
        trial = HeadTrial(layer, head, *paired_gain(state.baseline, scores))
        state = dataclasses.replace(state, trials=(*state.trials, trial))
        if file is not None:
            state.save(file)
        progress(len(state.trials), len(state.candidates))
    if file is not None:
        state.save(file)
    return state


def paired_gain(before: Scores, after: Scores) -> tuple[float, float, float, float]:
    """Gain in the mean over data sets, its 95 % interval and p-value, by a paired bootstrap with a fixed seed."""
    random = np.random.default_rng(0)
    gain, draws = 0.0, np.zeros(_DRAWS)
    for name in sorted(before):
        change: NDArray[np.float64] = np.asarray(after[name], float) - np.asarray(before[name], float)
        gain += float(change.mean()) / len(before)
        for i in range(_DRAWS):  # one by one: a thousand draws of a large set at once would take a gigabyte
            draws[i] += change[random.integers(len(change), size=len(change))].mean() / len(before)
    low, high = np.quantile(draws, [0.025, 0.975])
    return gain, float(low), float(high), float((1 + (draws <= 0).sum()) / (1 + _DRAWS))


def _candidates(
    model: PreTrainedModel,
    evaluate: Callable[[PreTrainedModel], Scores],
    config: ACTConfig,
    heads: Mapping[int, tuple[int, ...]],
    max_evals: int | None,
) -> tuple[tuple[int, int], ...]:
    every = [(layer, head) for layer, some in heads.items() for head in some]
    if max_evals is None or max_evals >= len(every):
        return tuple(every)
    with apply_act(model, dataclasses.replace(config, heads=heads, beta=1.0, model_hash=None)) as handle:
        evaluate(model)
    mass = {(s.layer, s.head): s.mass for s in handle.stats()}
    return tuple(sorted(every, key=lambda at: -mass.get(at, 0.0))[:max_evals])


def _scores(scores: Scores, like: Scores | None) -> dict[str, tuple[float, ...]]:
    """Scores as they are kept, if they are whole and of the same samples as before."""
    kept = {name: tuple(float(s) for s in some) for name, some in scores.items()}
    if not kept or not all(kept.values()):
        raise ValueError(f"evaluate must return scores by data set, got { ({n: len(s) for n, s in kept.items()}) }")
    if not all(np.isfinite(some).all() for some in kept.values()):
        raise ValueError("evaluate returned scores that are not finite")
    sizes, wanted = ({n: len(s) for n, s in x.items()} for x in (kept, kept if like is None else like))
    if sizes != wanted:
        raise ValueError(f"evaluate returned {sizes} samples, without calibration {wanted}")
    return kept


def _resumed(
    state: HeadSelection, config: ACTConfig, heads: Mapping[int, tuple[int, ...]], found: str, max_evals: int | None,
    file: Path,
) -> HeadSelection:  # fmt: skip
    if state.model_hash != found:
        raise ValueError(f"{file} holds a search of model {state.model_hash}, this is {found}; use resume=False")
    every = {(layer, head) for layer, some in heads.items() for head in some}
    count = len(every) if max_evals is None else min(max_evals, len(every))
    if state.base != config or not set(state.candidates) <= every or len(state.candidates) != count:
        raise ValueError(f"{file} holds a search with other settings; use another path, or resume=False")
    return state
