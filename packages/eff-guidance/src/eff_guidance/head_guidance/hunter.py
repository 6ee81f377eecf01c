"""HeadHunter: a greedy search for the heads whose damage guides best (arXiv 2506.10978, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from eff_guidance.denoiser import denoiser_of
from eff_guidance.head_guidance.config import SoftPAGConfig
from eff_guidance.head_guidance.heads import list_heads, list_layers, read_head
from eff_guidance.head_guidance.headset import HeadHunterConfig, HeadSet, Round, Written
from eff_guidance.head_guidance.pipelines import apply_head_guidance

Generate = Callable[[list[str], list[int], SoftPAGConfig], Sequence[Any]]
Objective = Callable[[Sequence[Any], list[str]], Iterable[float]]


class HeadHunter:
    """Finds heads by making pictures with each of them and scoring these.

    In each round every head that is left is tried together with the chosen ones, on the same prompts and seeds; the
    best join. M pairs, N heads, k a round cost ``M (N + (N - k) + (N - 2k) + ...)`` pictures. Score the result on other
    seeds: the best of many noisy scores looks better than it is.

    Args:
        generate: A pipeline of diffusers, or ``generate(prompts, seeds, guidance)``, which makes one picture a pair,
            guided by ``guidance`` (`SoftPAGConfig`). A pipeline is run as `pipeline_generator` says.
        objective: ``objective(pictures, prompts)`` gives one number a picture, the more the better. It is called when
            all pictures of a head are made.
        prompts: What to make.
        seeds: One a prompt; by default 0, 1, 2, ...
        config: Rounds, heads a round, damage and scale.
        heads: Heads to choose from; by default all of the pipeline's denoiser.
        floors: Pairs of an objective and the least mean that a head must reach in it to be chosen at all.
        progress: Whether to show a bar.

    Raises:
        ValueError: no prompts, another number of seeds, fewer heads than are to be chosen, a function without heads.
    """

    def __init__(
        self,
        generate: Any,
        objective: Objective,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        config: HeadHunterConfig | None = None,
        heads: Sequence[Sequence[str | int]] | None = None,
        floors: Sequence[tuple[Objective, float]] = (),
        progress: bool = True,
    ) -> None:
        model = denoiser_of(generate) if hasattr(generate, "scheduler") else None
        self.config = config or HeadHunterConfig()
        self.prompts = list(prompts)
        self.seeds = list(range(len(self.prompts))) if seeds is None else [int(seed) for seed in seeds]
        self.objective, self.floors, self.progress = objective, tuple(floors), progress
        if not self.prompts or len(self.seeds) != len(self.prompts):
            raise ValueError(
                f"{len(self.prompts)} prompts and {len(self.seeds)} seeds; use one seed a prompt, at least one"
            )
        if model is not None:
            self.generate: Generate = pipeline_generator(generate)
            self.model = _fingerprint(model)
            self.pool = list_heads(model) if heads is None else [read_head(tuple(head)) for head in heads]
        else:
            if heads is None:
                raise ValueError("a function does not say which heads there are; pass heads=list_heads(model)")
            self.generate, self.model = generate, "function"
            self.pool = [read_head(tuple(head)) for head in heads]
        wanted = self.config.rounds * self.config.heads_per_round
        if wanted > len(self.pool) or len(set(self.pool)) < len(self.pool):
            raise ValueError(
                f"{wanted} heads cannot be chosen from {len(set(self.pool))}; use fewer rounds or heads_per_round"
            )

    def search(self, resume: str | Path | None = None) -> HeadSet:
        """Search, or go on with a search.

        Args:
            resume: File of a `HeadSet` that is written after each head; a search that is there goes on where it was.

        Returns:
            The chosen heads with all scores.

        Raises:
            ValueError: the file is of another search; the objective gave another number of scores than pictures.
        """
        state = self._begin(resume)
        left = (len(self.pool) - self.config.heads_per_round * r for r in range(self.config.rounds))
        with _bar(self.progress, sum(left), sum(len(r.heads) for r in state.rounds)) as step:
            while not state.finished:
                state = self._one(state)
                if resume is not None:
                    state.save(resume)
                step(f"{len(state.heads)} chosen")
        return state

    def _begin(self, path: str | Path | None) -> HeadSet:
        fresh = HeadSet(
            config=self.config, model=self.model, prompts=tuple(self.prompts), seeds=tuple(self.seeds),
            pool=tuple(tuple(head) for head in self.pool), rounds=(Round(),),
        )  # fmt: skip
        if path is None or not Path(path).exists():
            return fresh
        found = HeadSet.load(path)
        for name in ("config", "model", "prompts", "seeds", "pool"):
            if getattr(found, name) != getattr(fresh, name):
                raise ValueError(f"{path} is of another search: {name} is {getattr(found, name)!r}")
        return found

    def _one(self, state: HeadSet) -> HeadSet:
        """Try the next head; choose when it was the last of its round."""
        now = state.rounds[-1]
        left = [head for head in self.pool if head not in set(state.heads)]
        head = left[len(now.heads)]
        pictures = self.generate(self.prompts, self.seeds, self.config.guidance([*state.heads, head]))
        score = self._mean(self.objective, pictures)
        passed = all(self._mean(floor, pictures) >= least for floor, least in self.floors)
        now = Round(
            (*now.heads, tuple(head)), (*now.scores, score if math.isfinite(score) else None), (*now.passed, passed)
        )
        state = replace(state, rounds=(*state.rounds[:-1], now), generations=state.generations + len(self.prompts))
        if len(now.heads) < len(left):
            return state
        best = now.ranked()[: self.config.heads_per_round]
        finished = len(state.rounds) == self.config.rounds
        chosen: tuple[Written, ...] = (*state.heads, *(tuple(h) for h, _ in best))
        return replace(
            state, heads=chosen, scores=(*state.scores, *(s for _, s in best)), finished=finished,
            rounds=state.rounds if finished else (*state.rounds, Round()),
        )  # fmt: skip

    def _mean(self, objective: Objective, pictures: Sequence[Any]) -> float:
        scores = [float(score) for score in objective(pictures, self.prompts)]
        if len(scores) != len(self.prompts):
            raise ValueError(f"the objective gave {len(scores)} scores for {len(self.prompts)} pictures")
        return math.fsum(scores) / len(scores)


def pipeline_generator(pipe: Any, *, batch_size: int = 8, batched: bool = False, **call: Any) -> Generate:
    """``generate(prompts, seeds, guidance)`` by a pipeline, as `HeadHunter` takes it.

    Args:
        pipe: SD3, FLUX, SD1.5 or SDXL; CFG is off (FLUX: "true" CFG is), as in the paper's search.
        batch_size: Pictures of one call.
        batched: Of `apply_head_guidance`.
        call: Arguments of the pipeline's call, such as ``num_inference_steps=20``.
    """
    if hasattr(type(pipe), "do_classifier_free_guidance"):
        call.setdefault("guidance_scale", 1.0)

    def generate(prompts: list[str], seeds: list[int], guidance: SoftPAGConfig) -> list[Any]:
        import torch

        pictures: list[Any] = []
        with apply_head_guidance(pipe, guidance, batched=batched):
            for at in range(0, len(prompts), batch_size):
                noise = [torch.Generator().manual_seed(seed) for seed in seeds[at : at + batch_size]]
                pictures += list(pipe(prompt=prompts[at : at + batch_size], generator=noise, **call).images)
        return pictures

    return generate


def harmonic(one: Objective, other: Objective) -> Objective:
    """The harmonic mean 2 p c / (p + c) of two objectives, picture by picture; 0 where both are."""

    def objective(pictures: Sequence[Any], prompts: list[str]) -> list[float]:
        both = zip(one(pictures, prompts), other(pictures, prompts), strict=True)
        return [2 * p * c / (p + c) if p + c else 0.0 for p, c in both]

    return objective


def _fingerprint(model: nn.Module) -> str:
    inner = getattr(model, "_orig_mod", model)
    counts = [at.num_heads for at in list_layers(model, parts=("attn", "attn2"))]
    return f"{type(inner).__name__} {'+'.join(map(str, counts))}"


def _bar(show: bool, total: int, done: int) -> Any:
    """A context whose value, called with a text, takes one step."""
    if not show:
        return nullcontext(lambda text: None)
    return _Bar(total, done)


class _Bar:
    def __init__(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("heads"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Callable[[str], None]:
        self.bar.start()
        return lambda text: self.bar.update(self.task, advance=1, description=text)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
