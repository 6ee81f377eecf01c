"""What a treated layer does in a pass: the rule that answers its attention.

The rule holds the settings alone. What is known of the keys goes with the cache, which a hook on the decoder hands down
among the arguments of each forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels.edit import uncompiled
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, Part
from eff_kernels.edit.caches import given_cache, returned_cache
from torch import Tensor

from eff_attention.passes import key_bits
from eff_attention.plain import answer_of_one, obstacles
from eff_attention.sink_calibration import fast
from eff_attention.sink_calibration.config import ACTConfig
from eff_attention.sink_calibration.frame import Frame, Pass
from eff_attention.sink_calibration.functional import Row, calibrate_attention
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
        sinks, seen = self._sinks(call, now, heads, frame, roles.position)
        row: Row | None = None  # of a single query whose weights are known
        mass: Tensor | None = None
        if seen is not None and seen.weights is not None:
            row = Row.of(seen.weights, sinks)
            mass = row.mass[..., 0].sum(0)
        elif seen is not None:
            mass = (seen.sums[..., : sinks.shape[-1]] * sinks).sum((0, 2))
        count = sinks.sum((0, 2))
        self.counts.note(call, heads, len(sinks), count, mass, frame.queries)
        if self.config.beta == 1.0 or not bool(count.any()):
            return attend(call)
        if row is not None and self.config.path == "auto" and attend.alone:
            return _of_one(call, attend, heads, row.calibrated(self.config.beta))
        return self._changed(call, attend, heads, sinks, seen)

    def _sinks(
        self, call: AttentionCall, now: Pass, heads: tuple[int, ...], frame: Frame, position: int
    ) -> tuple[Tensor, Seen | None]:
        """The sinks [B, h, n] for the queries of a call, and what was looked at to find them."""
        config, states, key, length = self.config, now.states, (self.name, call.layer or 0), frame.real.shape[1]
        old = states.get(key) if position else None  # a cache that was reset starts over
        if old is not None and old.heads != heads:
            old = None
        if old is not None:
            old = old.followed(call.k, position, call.name)
        if not frame.prompt and config.decode == "prefill_sinks":
            if old is None:
                return frame.real.new_zeros((frame.real.shape[0], len(heads), length)), None
            states[key] = old
            return torch.nn.functional.pad(old.sinks, (0, length - old.length)), None
        seen = look(call, heads, frame.own, frame.seen_by)
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
        self, call: AttentionCall, attend: Attend, heads: tuple[int, ...], sinks: Tensor, seen: Seen | None
    ) -> AttentionOutput:
        beta, path = self.config.beta, self.config.path
        full = sinks
        if sinks.shape[-1] != call.num_keys:
            full = torch.nn.functional.pad(sinks, (0, call.num_keys - sinks.shape[-1]))
        missing = obstacles(call)
        if path == "fast" and missing:
            raise NotImplementedError(f"{call.name} has {missing}, which path='fast' does not know; use 'auto'")
        if (
            path != "explicit"
            and not missing
            and seen is not None
            and seen.lse is not None
            and (path == "fast" or fast.is_worth_it(call, sinks))
        ):
            base = attend(call)
            out = fast.calibrated(call, base.out, seen.lse, sinks, heads, beta)
            if out is not None:
                return base.replace(out=out)
        place = {head: i for i, head in enumerate(heads)}

        def edit(block: Tensor, part: Part) -> Tensor:
            return calibrate_attention(block, full[:, [place[h] for h in part.head_numbers]], beta)

        return attend.with_weights(call, edit, heads=heads)


def _of_one(call: AttentionCall, attend: Attend, heads: tuple[int, ...], weights: Tensor) -> AttentionOutput:
    """The answer to a plain call of one query with weights [B, h, S] of some heads."""
    if len(heads) == call.num_heads:
        return answer_of_one(call, weights)
    group = call.num_heads // call.num_kv_heads
    part = answer_of_one(call.replace(v=call.v[:, [h // group for h in heads]]), weights)
    host = attend(call)
    changed = host.out.clone()
    changed[:, list(heads)] = part.out
    return host.replace(out=changed)
