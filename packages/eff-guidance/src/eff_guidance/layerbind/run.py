"""One call of a pipeline with a layout: its branches, its steps, and what each evaluation of the transformer does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eff_guidance.layerbind.blend import Blended, blend_branches, whole
from eff_guidance.layerbind.config import LayerBindConfig
from eff_guidance.layerbind.hosts import Host
from eff_guidance.layerbind.layout import Layout
from eff_guidance.layerbind.passes import BranchPass, NursingPass, Stream
from eff_guidance.layerbind.prompts import LayoutPrompts, Prompt
from eff_guidance.layerbind.regions import Grid, Region, regions_of
from eff_guidance.together import ExtraPass, Rows, current_extra, tell_rows

_NOW: ContextVar[Run | None] = ContextVar("eff_layerbind_run", default=None)


def current_run() -> Run | None:
    """The run of this thread."""
    return _NOW.get()


@dataclass(frozen=True)
class Binding:
    """A layout with its encoded prompts and settings; the layers in the order of painting."""

    layout: Layout
    config: LayerBindConfig
    prompts: LayoutPrompts

    @property
    def works(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.layout.layers) and self.config.eta2 > 0

    @property
    def painted(self) -> list[tuple[Prompt, Prompt | None]]:
        """Prompt and negative prompt of each layer, the furthest first."""
        return list(zip(self.prompts.layers, self.prompts.negatives, strict=True))[::-1]


@dataclass(frozen=True)
class Cached:
    """What an earlier run left, to start from.

    Attributes:
        background: Latents of the background at each step of phase 1 and after it.
        branches: Of each layer at the end of phase 1; None for one that is to be rebuilt.
    """

    background: Sequence[Tensor]
    branches: Sequence[Tensor | None]


@dataclass(eq=False)
class Run:
    """The state of one call.

    Args:
        pipe: The pipeline.
        binding: What to do.
        guidance: ``guidance()`` gives (scale, "batched" | "separate" | "none") when the steps have begun.
        cached: To redo a part of an earlier run only.
    """

    pipe: Any
    binding: Binding
    guidance: Callable[[], tuple[float, str]]
    cached: Cached | None = None
    step: int = 0
    calls: int = 0
    grid: Grid | None = None
    regions: list[Region] = field(default_factory=list)
    branches: list[Tensor] = field(default_factory=list)
    found: dict[int, list[Tensor]] = field(default_factory=dict)
    extra: dict[int, tuple[float, Tensor]] = field(default_factory=dict)  # of an extra pass: scale and velocity
    trajectory: list[Tensor] = field(default_factory=list)
    blended: Blended | None = None
    masks: list[Tensor] = field(default_factory=list)
    ends: tuple[int, int] = (0, 0)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Take part in what this thread runs."""
        token = _NOW.set(self)
        try:
            yield
        finally:
            _NOW.reset(token)

    @property
    def done(self) -> bool:
        """Whether the rest of the steps is plain."""
        return self.grid is not None and self.step >= self.ends[1]

    # --- the transformer --------------------------------------------------------------------------------------------

    def evaluate(self, model: Any, plain: Callable[..., Any], args: dict[str, Any]) -> Any:
        """Answer one call of the transformer; ``plain`` is its own forward."""
        _, way = self.guidance()
        extra = current_extra()
        if extra is not None and extra.joined:
            raise ValueError(
                "a layout cannot be combined with guidance in one batch with other passes; use batched=False"
            )
        if self.grid is None:
            self._begin(model, args, way)
        self.calls += extra is None
        if self.step < self.ends[0] and self.cached is not None:
            if all(b is not None for b in self.cached.branches):
                return self._give(model, args, torch.zeros_like(args["hidden_states"]))
            now = self.cached.background[self.step].to(args["hidden_states"])
            args = {**args, "hidden_states": torch.cat([now] * (len(args["hidden_states"]) // len(now)))}
        if extra is not None:  # with the prompt alone
            if self.step < self.ends[0]:
                return self._branches(model, plain, args, bound=0, extra=extra)
            return self._nursing(model, plain, args, bound=0)
        if self.calls > (2 if way == "separate" else 1):
            raise RuntimeError("the transformer ran more often in one step than LayerBind expects")
        if way != "batched":
            uncond = self.calls == 2
            if self.step < self.ends[0]:
                return self._branches(model, plain, args, bound=len(args["hidden_states"]) if uncond else 0)
            return plain(**args) if uncond else self._nursing(model, plain, args, bound=0)
        count = len(args["hidden_states"]) // 2
        if self.step >= self.ends[0]:
            return self._nursing(model, plain, args, bound=count)
        if self._one_length(args["encoder_hidden_states"].shape[1]):
            return self._branches(model, plain, args, bound=count)
        parts = [
            self._branches(model, plain, {k: _rows(v, s, 2 * count) for k, v in args.items()}, bound=bound)
            for s, bound in ((slice(0, count), count), (slice(count, None), 0))
        ]
        return self._give(model, args, torch.cat([p[0] for p in parts]))

    def _one_length(self, length: int) -> bool:
        """Whether all prompts have this many tokens, so that rows with and without them fit one batch."""
        prompts = self.binding.prompts
        all_of_them = (prompts.background, *prompts.layers, *prompts.negatives)
        return all(len(p.tokens) == length for p in all_of_them if p is not None)

    def _give(self, model: Any, args: dict[str, Any], sample: Tensor) -> Any:
        if not args.get("return_dict", True):
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _begin(self, model: Any, args: dict[str, Any], way: str) -> None:
        host = Host.of(model)
        latents = args["hidden_states"]
        latents = latents[: len(latents) // 2] if way == "batched" else latents
        self.grid = host.grid(model, args)
        self.regions = regions_of(self.binding.layout, self.grid, latents.device)
        self.ends = self.binding.config.switches(len(self.pipe.scheduler.timesteps))
        tokens = host.to_tokens(model, latents)
        self.masks = [whole(r, len(latents)).mask for r in self.regions]
        if self.cached is not None:
            tokens = host.to_tokens(model, self.cached.background[0].to(latents))
        self.branches = [tokens.index_select(1, r.idx) for r in self.regions]
        self.trajectory = [host.from_tokens(model, tokens, self.grid)]

    def _branches(
        self, model: Any, plain: Callable[..., Any], args: dict[str, Any], *, bound: int, extra: ExtraPass | None = None
    ) -> Any:
        """One evaluation in phase 1; rows before ``bound`` are without prompt."""
        host, config, prompts = Host.of(model), self.binding.config, self.binding.prompts
        rows = len(args["hidden_states"])
        # FLUX's pipeline leaves one given prompt at one row for all of its pictures.
        given = Prompt(
            *(args[k].expand(rows, *args[k].shape[1:]) for k in ("encoder_hidden_states", "pooled_projections"))
        )
        text = _rows_of(None, prompts.background, given, bound)
        args = host.with_text(args, text.tokens, text.pooled)
        streams = {}
        for i, (prompt, negative) in enumerate(self.binding.painted):
            if self.cached is not None and self.cached.branches[i] is not None:
                continue
            words = _rows_of(negative, prompt, given, bound)
            tokens = self.branches[i]
            tokens = torch.cat([tokens] * (rows // len(tokens)))
            pooled = words.pooled if config.own_pooled else text.pooled
            streams[i] = Stream(self.regions[i], tokens, words.tokens, pooled)
        hard = config.blocks_of(len(host.blocks(model)), flux=host.flux)
        step = BranchPass(
            host, model, args, list(streams.values()), hard=hard, reverse=config.reverse_adaptation, bound=bound
        )
        with step.active(), tell_rows(Rows(bound, layout="scene")):
            out = plain(**{**args, "return_dict": False})
        for i, stream in streams.items():
            assert stream.velocity is not None  # the last block has run
            if extra is not None:
                self.extra[i] = extra.scale, stream.velocity
                continue
            # with and without prompt
            self.found.setdefault(i, []).extend(v for v in stream.velocity.split([bound, rows - bound]) if len(v))
        return self._give(model, args, out[0])

    def _nursing(self, model: Any, plain: Callable[..., Any], args: dict[str, Any], *, bound: int) -> Any:
        """One evaluation in phase 2."""
        host = Host.of(model)
        scene = args["encoder_hidden_states"]
        words = [_expand(prompt.tokens, scene) for prompt, _ in self.binding.painted]
        text = torch.cat([*words, scene] if host.flux else [scene, *words], 1)
        lengths = [w.shape[1] for w in words]
        step = NursingPass(host, lengths, self.regions, self.masks, self.binding.config.opacity, bound)
        with step.active(), tell_rows(Rows(bound, layout="scene")):
            return plain(**host.with_text(args, text, args["pooled_projections"]))

    # --- the steps --------------------------------------------------------------------------------------------------

    def finish_step(self, latents: Tensor) -> Tensor:
        """Take the branches one step on; what the picture's latents are after this step."""
        if self.step < self.ends[0]:
            latents = self._finish_branches(latents)
        self.step += 1
        self.calls = 0
        return latents

    def _finish_branches(self, latents: Tensor) -> Tensor:
        model = inner(self.pipe.transformer)
        host, grid = Host.of(model), self.grid
        assert grid is not None
        scale, way = self.guidance()
        sigmas = self.pipe.scheduler.sigmas
        change = (sigmas[self.step + 1] - sigmas[self.step]).to(latents.device)
        for i, parts in self.found.items():
            velocity = cond = parts[0]
            if len(parts) == 2:
                uncond, cond = parts if way == "batched" else parts[::-1]
                velocity = uncond + scale * (cond - uncond)
            if i in self.extra:  # the layers are guided as the scene is
                factor, other = self.extra[i]
                velocity = velocity + factor * (cond - other)
            moved = self.branches[i].float() + change * velocity
            self.branches[i] = moved.to(velocity.dtype)
        self.found, self.extra = {}, {}
        if self.cached is not None:
            latents = self.cached.background[self.step + 1].to(latents)
        self.trajectory.append(latents)
        if self.step + 1 < self.ends[0]:
            return latents
        if self.cached is not None:
            kept = self.cached.branches
            self.branches = [own if b is None else b.to(own) for own, b in zip(self.branches, kept, strict=True)]
        tokens = host.to_tokens(model, latents)
        self.blended = blend_branches(tokens, self.branches, self.regions, self.binding.config)
        self.masks = self.blended.masks
        return host.from_tokens(model, self.blended.latents, grid)


def inner(model: Any) -> Any:
    """A transformer without the wrapper of ``torch.compile``."""
    return getattr(model, "_orig_mod", model)


def _rows(value: Any, rows: slice, count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value


def _rows_of(without: Prompt | None, prompt: Prompt, given: Prompt, bound: int) -> Prompt:
    """Prompts of a batch whose first ``bound`` rows are ``without`` (those of the call if None)."""
    parts = []
    for i, own in enumerate(given):
        first = own[:bound] if without is None else _expand(without[i], own[:bound])
        last = _expand(prompt[i], own[bound:])
        parts.append(torch.cat([first, last]) if len(first) and len(last) else first if len(first) else last)
    return Prompt(*parts)


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like)[None].expand(len(like), *value.shape)
