"""One evaluation of the transformer with layers beside it, and how its blocks and attention take part.

A pass lives in a context variable for as long as the transformer runs, so that nothing of a call is kept on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput
from torch import Tensor, nn

from eff_guidance.denoiser import check_whole
from eff_guidance.layerbind.hosts import Host, named_arguments
from eff_guidance.layerbind.ops import composite_layers
from eff_guidance.layerbind.regions import Grid, Region, groups_by_neighbours
from eff_guidance.together import Rows, tell_parts, tell_rows

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
    check_whole(call.module)
    if call.mask is not None:
        raise ValueError(f"{call.name} got an attention mask; layers cannot be combined with an attention mask")
    with tell_parts():
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


@dataclass(eq=False)
class Bundle:
    """Branches of one size that run as one batch, branch by branch: [L * B, ...]."""

    places: list[int]
    streams: list[Stream]
    hidden: Tensor
    text: Tensor
    temb: Tensor
    more: dict[str, Any]

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        """Some pictures of each branch."""
        return x if rows == slice(None) else x.unflatten(0, (len(self.streams), -1))[:, rows].flatten(0, 1)

    def put(self, x: Tensor, rows: slice, part: Tensor) -> Tensor:
        """``x`` with some pictures of each branch replaced."""
        if rows == slice(None):
            return part
        made = x.unflatten(0, (len(self.streams), -1)).clone()
        made[:, rows] = part.unflatten(0, (len(self.streams), -1))
        return made.flatten(0, 1)


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
        bound: Rows at the front of the batch that are without prompt; hard binding is for those behind them.
    """

    def __init__(
        self,
        host: Host,
        model: Any,
        args: dict[str, Any],
        streams: Sequence[Stream],
        *,
        hard: frozenset[int],
        reverse: bool,
        bound: int = 0,
    ) -> None:
        self.host, self.model, self.args, self.streams = host, model, args, streams
        self.hard = frozenset() if bound == len(args["hidden_states"]) else hard
        self.reverse, self.bound = reverse, bound
        self.grid: Grid = host.grid(model, args)
        self.last = len(host.blocks(model)) - 1
        self.block = -1
        self.bundles: list[Bundle] = []
        self.role: tuple[Bundle, slice, bool] | None = None  # who runs, which rows, and whether hard binding is on
        self.background: dict[str, tuple[Tensor, Tensor]] = {}
        self.branches: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
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
            self._run(block, args, slice(self.bound, None) if self.bound else slice(None), hard=True)

    def after(self, index: int, block: nn.Module, args: dict[str, Any]) -> None:
        """End a block: a normal one runs the branches now, the last one takes their velocities."""
        if self.role is not None:
            return
        if index not in self.hard:
            self._run(block, args, slice(None), hard=False)
        elif self.bound:
            self._run(block, args, slice(0, self.bound), hard=False)
        if index == self.last:
            for bundle in self.bundles:
                found = self.host.output(self.model, bundle.hidden, bundle.temb).chunk(len(bundle.streams))
                for stream, velocity in zip(bundle.streams, found, strict=True):
                    stream.velocity = velocity

    def _enter(self) -> None:
        kinds: dict[Any, list[int]] = {}
        for i, s in enumerate(self.streams):
            # FLUX's positions hold for a whole batch.
            key = i if self.host.flux else (s.tokens.shape[1], s.text.shape[1])
            kinds.setdefault(key, []).append(i)
        latents, host, model = self.args["hidden_states"], self.host, self.model
        for places in kinds.values():
            streams = [self.streams[i] for i in places]
            hidden = [host.embed(model, latents, s.tokens, s.region.idx, self.grid) for s in streams]
            temb = [host.modulation(model, self.args, s.pooled) for s in streams]
            text = model.context_embedder(torch.cat([s.text for s in streams]))
            more = host.block_arguments(model, self.args, text.shape[1], streams[0].region.idx)
            self.bundles.append(Bundle(places, streams, torch.cat(hidden), text, torch.cat(temb), more))

    def _run(self, block: nn.Module, args: dict[str, Any], rows: slice, *, hard: bool) -> None:
        extra = args.get("joint_attention_kwargs")
        for b in self.bundles:
            self.role = b, rows, hard
            without = 0 if rows.start else self.bound
            try:
                with tell_rows(Rows(without, len(b.streams), "branch")):
                    text, hidden = block(
                        hidden_states=b.rows(b.hidden, rows),
                        encoder_hidden_states=b.rows(b.text, rows),
                        temb=b.rows(b.temb, rows),
                        joint_attention_kwargs=extra,
                        **b.more,
                    )
            finally:
                self.role = None
            b.hidden = b.put(b.hidden, rows, hidden)
            if text is not None:  # SD3's last block drops it
                b.text = b.put(b.text, rows, text)

    def attend(self, call: AttentionCall, attend: Attend) -> AttentionOutput | Tensor:
        """Answer one attention."""
        # SD3.5's second attention holds picture tokens alone.
        picture = slice(None) if call.streams is None else call.streams["image"]
        own = call.k[:, :, picture], call.v[:, :, picture]
        if self.role is None:
            if self.block not in self.hard or self.bound:
                self.background[call.name] = own
            return self._with_branches(call, attend, picture) if self.block in self.hard else attend(call)
        bundle, rows, hard = self.role
        if hard:
            if self.reverse:
                parts = zip(*(x.chunk(len(bundle.streams)) for x in own), strict=True)
                self.branches.setdefault(call.name, {}).update(zip(bundle.places, parts, strict=True))
            return attend(call)
        outside = [s.region.outside for s in bundle.streams]
        if not len(outside[0]):
            return attend(call)
        around = (torch.cat([x[rows].index_select(2, at) for at in outside]) for x in self.background[call.name])
        k, v = (torch.cat([x, y], 2) for x, y in zip((call.k, call.v), around, strict=True))
        return attend(call.replace(k=k, v=v, streams=None))

    def _with_branches(self, call: AttentionCall, attend: Attend, picture: slice) -> AttentionOutput | Tensor:
        """Attention of the background in which each picture token also sees the branches that do not cover it."""
        branches = self.branches.get(call.name)
        if not branches:
            return attend(call)
        q, k, v = (x[self.bound :] for x in (call.q, call.k, call.v))
        found = call.q.new_empty(q.shape, dtype=call.dtype)
        rest = torch.ones(call.num_queries, dtype=torch.bool, device=q.device)
        for tokens, near in self.groups:
            if near:
                at = tokens + (picture.start or 0)
                rest[at] = False
                keys = torch.cat([k, *(branches[i][0] for i in near)], 2)
                values = torch.cat([v, *(branches[i][1] for i in near)], 2)
                part = attend(call.replace(q=q.index_select(2, at), k=keys, v=values, streams=None)).out
                found = found.index_copy(2, at, part.to(found.dtype))
        at = rest.nonzero()[:, 0]
        if len(at):
            part = attend(call.replace(q=q.index_select(2, at), k=k, v=v, streams=None)).out
            found = found.index_copy(2, at, part.to(found.dtype))
        if not self.bound:
            return found
        q, k, v = (x[: self.bound] for x in (call.q, call.k, call.v))
        return torch.cat([attend(call.replace(q=q, k=k, v=v, streams=None)).out.to(found.dtype), found])


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
        bound: First row of the batch that layers are for; those before it are without prompt.
    """

    def __init__(
        self,
        host: Host,
        lengths: Sequence[int],
        regions: Sequence[Region],
        masks: Sequence[Tensor],
        opacity: float,
        bound: int = 0,
    ) -> None:
        self.host, self.lengths, self.regions, self.masks = host, lengths, regions, masks
        self.opacity, self.bound = opacity, bound

    def attend(self, call: AttentionCall, attend: Attend) -> AttentionOutput | Tensor:
        """Answer one attention."""
        if call.streams is None:  # no text takes part: SD3.5's second attention
            return attend(call)
        picture, extra = call.streams["image"], sum(self.lengths)
        text = call.streams["text"]
        flux = self.host.flux
        scene = slice(text.start + extra, text.stop) if flux else slice(text.start, text.stop - extra)
        whole = slice(scene.start, picture.stop) if flux else slice(picture.start, scene.stop)
        base = attend(
            call.replace(q=call.q[:, :, whole], k=call.k[:, :, whole], v=call.v[:, :, whole], streams=None)
        ).out
        found = torch.zeros_like(call.q, dtype=base.dtype)  # words of rows without prompt are seen by none
        found[:, :, whole] = base
        q, k, v = (x[self.bound :] for x in (call.q, call.k, call.v))
        own = []
        at = text.start if flux else scene.stop
        for length, region in zip(self.lengths, self.regions, strict=True):
            mine = slice(at, at + length)
            at += length
            inside = region.idx + picture.start
            shown = [torch.cat([x[:, :, mine], x[:, :, picture]], 2) for x in (k, v)]
            own.append(attend(call.replace(q=q.index_select(2, inside), k=shown[0], v=shown[1], streams=None)).out)
            said = [torch.cat([x[:, :, mine], x.index_select(2, inside), x[:, :, scene]], 2) for x in (k, v)]
            words = attend(call.replace(q=q[:, :, mine], k=said[0], v=said[1], streams=None)).out
            found[self.bound :, :, mine] = words
        idx = [r.idx for r in self.regions]
        found[self.bound :, :, picture] = composite_layers(
            found[self.bound :, :, picture], own, self.masks, self.opacity, idx
        )
        return found
