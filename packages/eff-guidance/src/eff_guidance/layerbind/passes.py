"""One evaluation of the transformer with layers beside it, and how its blocks and attention take part.

A pass lives in a context variable for as long as the transformer runs, so that nothing of a call is kept on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput
from torch import Tensor, nn

from eff_guidance.layerbind.hosts import Host, named_arguments
from eff_guidance.layerbind.ops import composite_layers
from eff_guidance.layerbind.regions import Grid, Region, groups_by_neighbours

_NOW: ContextVar[Pass | None] = ContextVar("eff_layerbind_pass", default=None)


class Pass:
    """Base: a pass that changes nothing."""

    def attend(self, call: AttentionCall, attend: Attend) -> AttentionOutput | Tensor:
        """Answer one attention."""
        return attend(call)

    def before(self, index: int, block: nn.Module, args: dict[str, Any]) -> None:
        """A block is about to run."""

    def after(self, index: int, block: nn.Module, args: dict[str, Any]) -> None:
        """A block has run."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Take part in what this thread runs."""
        token = _NOW.set(self)
        try:
            yield
        finally:
            _NOW.reset(token)


def rule(call: AttentionCall, attend: Attend) -> AttentionOutput | Tensor:
    """The rule of all attention modules: the current pass answers."""
    now = _NOW.get()
    if now is None:
        return attend(call)
    if call.mask is not None:
        raise ValueError(f"{call.name} got an attention mask; layers and a mask of one's own do not go together")
    return now.attend(call, attend)


class BlockHook:
    """Tells the current pass that a block is about to run, or has run."""

    def __init__(self, index: int, *, after: bool) -> None:
        self.index, self.after = index, after

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Tell it."""
        now = _NOW.get()
        if now is not None:
            named = named_arguments(type(block).forward, args, kwargs)
            (now.after if self.after else now.before)(self.index, block, named)


@dataclass(eq=False)
class Stream:
    """A layer's branch in one pass.

    Attributes:
        region: Its tokens.
        tokens: Its latents, [B, n, C].
        text: Its prompt, [B, T, D].
        pooled: Its pooled prompt, [B, P].
        velocity: What the pass found, [B, n, C].
    """

    region: Region
    tokens: Tensor
    text: Tensor
    pooled: Tensor
    velocity: Tensor | None = None
    hidden: Tensor = field(init=False)
    temb: Tensor = field(init=False)
    more: dict[str, Any] = field(init=False)


class BranchPass(Pass):
    """Phase 1: the background with its prompt, and each layer in a branch of its own (equations 5 to 8).

    In a normal block the background runs first, and each branch then sees itself, its text, and the background's
    tokens outside of its region. In a hard-binding block the branches run first and see themselves and their text
    only; the background sees the branches around it, unless that is off.

    Args:
        host: The family of the model.
        model: The transformer.
        args: The call's arguments.
        streams: The branches.
        hard: The hard-binding blocks.
        reverse: Whether the background sees branches there.
    """

    def __init__(
        self, host: Host, model: Any, args: dict[str, Any], streams: Sequence[Stream], *, hard: frozenset[int],
        reverse: bool,
    ) -> None:  # fmt: skip
        self.host, self.model, self.args, self.streams = host, model, args, streams
        self.hard, self.reverse = hard, reverse
        self.grid: Grid = host.grid(model, args)
        self.last = len(host.blocks(model)) - 1
        self.block = -1
        self.role: Stream | None = None
        self.background: dict[str, tuple[Tensor, Tensor]] = {}
        self.branches: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.groups = (
            groups_by_neighbours([s.region for s in streams], self.grid.high * self.grid.wide) if reverse else []
        )

    def before(self, index: int, block: nn.Module, args: dict[str, Any]) -> None:
        """Begin a block: the first one embeds the branches, a hard-binding one runs them first."""
        if self.role is not None:
            return
        if index == 0:
            self._enter()
        self.block = index
        self.background, self.branches = {}, {}
        if index in self.hard:
            self._run(block, args)

    def after(self, index: int, block: nn.Module, args: dict[str, Any]) -> None:
        """End a block: a normal one runs the branches now, the last one takes their velocities."""
        if self.role is not None:
            return
        if index not in self.hard:
            self._run(block, args)
        if index == self.last:
            for stream in self.streams:
                stream.velocity = self.host.output(self.model, stream.hidden, stream.temb)

    def _enter(self) -> None:
        latents = self.args["hidden_states"]
        for s in self.streams:
            s.hidden = self.host.embed(self.model, latents, s.tokens, s.region.idx, self.grid)
            s.temb = self.host.modulation(self.model, self.args, s.pooled)
            s.more = self.host.block_arguments(self.model, self.args, s.text.shape[1], s.region.idx)
            s.text = self.model.context_embedder(s.text)

    def _run(self, block: nn.Module, args: dict[str, Any]) -> None:
        extra = args.get("joint_attention_kwargs")
        for s in self.streams:
            self.role = s
            try:
                s.text, s.hidden = block(
                    hidden_states=s.hidden, encoder_hidden_states=s.text, temb=s.temb, joint_attention_kwargs=extra,
                    **s.more,
                )  # fmt: skip
            finally:
                self.role = None

    def attend(self, call: AttentionCall, attend: Attend) -> AttentionOutput | Tensor:
        """Answer one attention."""
        # SD3.5's second attention holds picture tokens alone.
        picture = slice(None) if call.streams is None else call.streams["image"]
        own = call.k[:, :, picture], call.v[:, :, picture]
        if self.role is None:
            if self.block not in self.hard:
                self.background[call.name] = own
            elif self.reverse:
                return self._with_branches(call, attend, picture)
            return attend(call)
        if self.block in self.hard:
            self.branches.setdefault(call.name, []).append(own)
            return attend(call)
        outside = self.role.region.outside
        if not len(outside):
            return attend(call)
        k, v = (x.index_select(2, outside) for x in self.background[call.name])
        return attend(call.replace(k=torch.cat([call.k, k], 2), v=torch.cat([call.v, v], 2), streams=None))

    def _with_branches(self, call: AttentionCall, attend: Attend, picture: slice) -> Tensor:
        """Attention of the background in which each picture token also sees the branches that do not cover it."""
        start = picture.start or 0
        count = call.num_queries
        found = call.q.new_empty(call.q.shape, dtype=call.dtype)
        rest = torch.ones(count, dtype=torch.bool, device=call.q.device)
        branches = self.branches.get(call.name, [])
        for tokens, near in self.groups:
            if near and branches:
                at = tokens + start
                rest[at] = False
                k = torch.cat([call.k, *(branches[i][0] for i in near)], 2)
                v = torch.cat([call.v, *(branches[i][1] for i in near)], 2)
                part = attend(call.replace(q=call.q.index_select(2, at), k=k, v=v, streams=None)).out
                found = found.index_copy(2, at, part.to(found.dtype))
        at = rest.nonzero()[:, 0]
        if len(at):
            part = attend(call.replace(q=call.q.index_select(2, at), streams=None)).out
            found = found.index_copy(2, at, part.to(found.dtype))
        return found


class NursingPass(Pass):
    """Phase 2: over the scene's attention each layer's own is laid, back to front (equations 10 to 12).

    The layers' prompts run along in the text stream: behind the scene's where the picture comes first, before it where
    the text does.

    Args:
        host: The family of the model.
        lengths: Tokens of each layer's prompt, the furthest first.
        regions: The layers' tokens.
        masks: What of them is the layer's, [B, n] each.
        opacity: Weight of a layer.
    """

    def __init__(
        self, host: Host, lengths: Sequence[int], regions: Sequence[Region], masks: Sequence[Tensor], opacity: float
    ) -> None:
        self.host, self.lengths, self.regions, self.masks, self.opacity = host, lengths, regions, masks, opacity

    def attend(self, call: AttentionCall, attend: Attend) -> AttentionOutput | Tensor:
        """Answer one attention."""
        if call.streams is None:  # no text takes part: SD3.5's second attention
            return attend(call)
        picture, extra = call.streams["image"], sum(self.lengths)
        text = call.streams["text"]
        flux = self.host.flux
        scene = slice(text.start + extra, text.stop) if flux else slice(text.start, text.stop - extra)
        whole = slice(scene.start, picture.stop) if flux else slice(picture.start, scene.stop)
        base = self._part(call, attend, call.q[:, :, whole], [whole])
        shown = slice(picture.start - whole.start, picture.stop - whole.start)
        own, words = [], []
        at = text.start if flux else scene.stop
        for length, region in zip(self.lengths, self.regions, strict=True):
            mine = slice(at, at + length)
            at += length
            inside = region.idx + picture.start
            own.append(self._part(call, attend, call.q.index_select(2, inside), [mine, picture]))
            words.append(self._part(call, attend, call.q[:, :, mine], [mine, inside, scene]))
        made = composite_layers(base[:, :, shown], own, self.masks, self.opacity, [r.idx for r in self.regions])
        parts = [*words, base[:, :, : shown.start], made] if flux else [made, base[:, :, shown.stop :], *words]
        return torch.cat(parts, 2)

    def _part(self, call: AttentionCall, attend: Attend, q: Tensor, keys: list[slice | Tensor]) -> Tensor:
        k, v = (
            torch.cat([x.index_select(2, at) if isinstance(at, Tensor) else x[:, :, at] for at in keys], 2)
            for x in (call.k, call.v)
        )
        return attend(call.replace(q=q, k=k, v=v, streams=None)).out
