"""What a treated layer does in a pass: the rule that answers its attention.

The rule holds the settings alone. What is known of the keys goes with the cache, which a hook on the decoder hands down
among the arguments of each forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels import Attended, can_shift, row_calibrated, scale_weights
from eff_kernels.edit import uncompiled
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, Part
from eff_kernels.edit.caches import given_cache, returned_cache
from torch import Tensor

from eff_attention.passes import key_bits
from eff_attention.plain import alike, is_plain, obstacles
from eff_attention.sink_calibration import fast
from eff_attention.sink_calibration.config import ACTConfig
from eff_attention.sink_calibration.frame import Frame, Pass
from eff_attention.sink_calibration.functional import calibrate_attention
from eff_attention.sink_calibration.measure import Seen, look
from eff_attention.sink_calibration.state import ATTRIBUTE, SinkState
from eff_attention.sink_calibration.statistics import SinkCounts

ARGUMENT = "eff_sink_calibration"


def begin_pass(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The hook before the decoder."""
    if ARGUMENT in kwargs:
        return None
    cache = given_cache(kwargs)
    now = Pass() if cache is None else Pass(cache.__dict__.setdefault(ATTRIBUTE, {}))
    return args, {**kwargs, ARGUMENT: now}


def end_pass(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """The hook after the decoder: a cache that it made itself gets to know its sinks as well."""
    cache = returned_cache(output)
    if cache is not None and ARGUMENT in kwargs:
        cache.__dict__.setdefault(ATTRIBUTE, kwargs[ARGUMENT].states)


@dataclass(frozen=True)
class CalibrationRule:
    """The rule, the same for all layers.

    Attributes:
        config: Settings.
        heads: Heads to treat, by layer.
        counts: Where it notes what it did.
        name: Tells the states of two rules on one model apart.
    """

    config: ACTConfig
    heads: dict[int, tuple[int, ...]]
    counts: SinkCounts
    name: str = ""

    def __call__(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        """Answer a call of a layer."""
        # Whether there are sinks decides what is computed.
        return uncompiled(self._answer)(call, attend)

    def _answer(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        heads = self.heads.get(call.layer, ()) if call.layer is not None else ()
        if not heads:
            return attend(call)
        roles = call.roles
        if roles is None or ARGUMENT not in call.extra:
            raise NotImplementedError(f"{call.name} does not get the arguments of its decoder, which calibration needs")
        now: Pass = call.extra[ARGUMENT]
        frame = now.frame(call, roles)
        if self.config.decode == "off" and not frame.prompt:
            return attend(call)
        config = self.config
        plain = config.path != "explicit" and config.beta != 1.0 and frame.seen_by is not None and attend.alone
        plain = plain and is_plain(call) and frame.real.shape[1] == call.num_keys
        if plain and call.num_queries == 1 and config.path == "auto" and (frame.prompt or config.decode == "running"):
            return self._step(call, attend, now, heads, frame, roles.position)
        # The host's own kernel has what the search for sinks needs as well.
        base = attend.with_lse(call) if plain and call.num_queries > 1 else None
        sinks, seen = self._sinks(call, now, heads, frame, roles.position, None if base is None else base.lse)
        mass = None if seen is None else (seen.sums[..., : sinks.shape[-1]] * sinks).sum((0, 2))
        count = sinks.sum((0, 2))
        self.counts.note(call, heads, len(sinks), count, mass, frame.queries)
        if config.beta == 1.0 or not bool(count.any()):
            return attend(call) if base is None else base
        return self._changed(call, attend, heads, sinks, seen, base)

    def _step(
        self, call: AttentionCall, attend: Attend, now: Pass, heads: tuple[int, ...], frame: Frame, position: int
    ) -> AttentionOutput:
        """The answer to a plain call of one query."""
        old = self._before(call, now, heads, position)
        query, key, value = (alike(call, x) for x in (call.q, call.k, call.v))
        seen, limits = now.limits(self.config, None if old is None else old.rows, _known(frame.seen_by), frame.real)
        some = len(heads) != call.num_heads
        if some:
            group = call.num_heads // call.num_kv_heads
            query = query[:, list(heads)]
            key, value = (x[:, [h // group for h in heads]] for x in (key, value))
        sums = query.new_zeros(len(query), len(heads), 0, dtype=torch.float32) if old is None else old.sums
        found = row_calibrated(query[:, :, 0], key, value, call.scale, sums, now.of_one(limits), self.config.beta)
        marks = key_bits(call.k) if old is None else old.marks_with(call.k, call.num_keys)
        now.states[self.name, call.layer or 0] = SinkState(heads, found.sums, seen, found.sinks, marks)
        self.counts.note(call, heads, len(query), found.number, found.mass, frame.queries)
        if found.out is None:
            return attend(call)
        if not some:
            return AttentionOutput(found.out[:, :, None])
        host = attend(call)
        changed = host.out.clone()
        changed[:, list(heads)] = found.out[:, :, None]
        return host.replace(out=changed)

    def _before(self, call: AttentionCall, now: Pass, heads: tuple[int, ...], position: int) -> SinkState | None:
        """What is known of the tokens before a call."""
        # A cache that was reset starts over.
        old = now.states.get((self.name, call.layer or 0)) if position else None
        return None if old is None or old.heads != heads else old.followed(call.k, position, call.name)

    def _sinks(
        self, call: AttentionCall, now: Pass, heads: tuple[int, ...], frame: Frame, position: int, lse: Tensor | None
    ) -> tuple[Tensor, Seen | None]:
        """The sinks [B, h, n] for the queries of a call, and what was looked at to find them."""
        config, states, key, length = self.config, now.states, (self.name, call.layer or 0), frame.real.shape[1]
        old = self._before(call, now, heads, position)
        if not frame.prompt and config.decode == "prefill_sinks":
            if old is None:
                return frame.real.new_zeros((frame.real.shape[0], len(heads), length)), None
            states[key] = old
            return torch.nn.functional.pad(old.sinks, (0, length - old.length)), None
        seen = look(call, heads, frame.own, frame.seen_by, lse)
        sums = seen.sums[..., :length]
        rows, limits = now.limits(config, None if old is None else old.rows, seen.rows, frame.real)
        if old is None:
            marks = key_bits(call.k[:, :, :length])
        else:
            sums = torch.nn.functional.pad(old.sums, (0, length - old.length)).add_(sums)
            marks = old.marks_with(call.k, length)
        sinks = limits.sinks(sums)
        states[key] = SinkState(heads, sums, rows, sinks, marks)
        return sinks, seen

    def _changed(
        self,
        call: AttentionCall,
        attend: Attend,
        heads: tuple[int, ...],
        sinks: Tensor,
        seen: Seen | None,
        base: AttentionOutput | None,
    ) -> AttentionOutput:
        beta, path = self.config.beta, self.config.path
        full = sinks
        if sinks.shape[-1] != call.num_keys:
            full = torch.nn.functional.pad(sinks, (0, call.num_keys - sinks.shape[-1]))
        if base is not None and base.lse is not None:
            query, key, value = (alike(call, x) for x in (call.q, call.k, call.v))
            if can_shift(query, key, value):
                attended = Attended(query, key, value, base.out, base.lse, call.scale)
                return base.replace(out=scale_weights(attended, full, beta, heads))
        missing = obstacles(call)
        if path == "fast" and missing:
            raise NotImplementedError(f"{call.name} has {missing}, which path='fast' does not know; use 'auto'")
        if (
            path != "explicit"
            and not missing
            and seen is not None
            and (path == "fast" or fast.is_worth_it(call, sinks))
        ):
            base = attend(call) if base is None else base
            out = fast.calibrated(call, base.out, seen.lse, sinks, heads, beta)
            if out is not None:
                return base.replace(out=out)
        place = {head: i for i, head in enumerate(heads)}

        def edit(block: Tensor, part: Part) -> Tensor:
            return calibrate_attention(block, full[:, [place[h] for h in part.head_numbers]], beta)

        return attend.with_weights(call, edit, heads=heads)


def _known(seen_by: Tensor | None) -> Tensor:
    if seen_by is None:
        raise RuntimeError("only calls whose queries are all tokens are answered in one step")
    return seen_by
