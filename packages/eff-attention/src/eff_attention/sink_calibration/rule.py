"""What a treated layer does in a pass: the rule that answers its attention.

The rule holds the settings alone. What is known of the keys goes with the cache, which a hook on the decoder hands down
among the arguments of each forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit import uncompiled
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, Part, Role
from eff_kernels.edit.caches import given_cache, returned_cache
from torch import Tensor

from eff_attention.sink_calibration import direct, fast
from eff_attention.sink_calibration.config import ACTConfig
from eff_attention.sink_calibration.functional import calibrate_attention, sinks_of_sums
from eff_attention.sink_calibration.measure import Seen, look
from eff_attention.sink_calibration.state import ATTRIBUTE, SinkState, marks_of
from eff_attention.sink_calibration.statistics import SinkCounts

ARGUMENT = "eff_sink_calibration"


@dataclass(frozen=True)
class Pass:
    """One forward pass: the states of the layers, by the name of the rule and the layer."""

    states: dict[tuple[str, int], SinkState] = field(default_factory=dict)


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
        prompt = bool((roles.queries.role != int(Role.GENERATED)).any())
        if self.config.decode == "off" and not prompt:
            return attend(call)
        length = roles.position + call.num_queries
        real = ~roles.keys.of(Role.PAD, Role.UNUSED)[:, :length]
        states = call.extra[ARGUMENT].states
        sinks, seen = self._sinks(call, states, heads, real, roles.position, frozen=not prompt)
        found = bool(sinks.any())
        self.counts.note(call, heads, sinks, seen, real[:, roles.position :])
        if self.config.beta == 1.0 or not found:
            return attend(call)
        return self._changed(call, attend, heads, sinks, seen)

    def _sinks(
        self,
        call: AttentionCall,
        states: dict[tuple[str, int], SinkState],
        heads: tuple[int, ...],
        real: Tensor,
        position: int,
        *,
        frozen: bool,
    ) -> tuple[Tensor, Seen | None]:
        """The sinks [B, h, n] for the queries of a call, and what was looked at to find them."""
        config, key, length = self.config, (self.name, call.layer or 0), real.shape[1]
        old = states.get(key) if position else None  # a cache that was reset begins anew
        if old is not None and old.heads != heads:
            old = None
        if old is not None:
            old = old.followed(call.k, position, call.name)
        if frozen and config.decode == "prefill_sinks":
            if old is None:
                return real.new_zeros((real.shape[0], len(heads), length)), None
            states[key] = old
            return torch.nn.functional.pad(old.sinks, (0, length - old.length)), None
        seen = look(call, heads, real[:, position:])
        sums, rows = seen.sums[..., :length], seen.rows[..., :length]
        if old is not None:
            before = old.grown(length)
            sums, rows = before[0] + sums, before[1] + rows
        sinks = sinks_of_sums(
            sums, rows[:, None], real[:, None], config.threshold, spare=config.spare, min_rows=config.min_rows
        )
        states[key] = SinkState(heads, sums, rows, sinks, marks_of(call.k, length))
        return sinks, seen

    def _changed(
        self, call: AttentionCall, attend: Attend, heads: tuple[int, ...], sinks: Tensor, seen: Seen | None
    ) -> AttentionOutput:
        beta, path = self.config.beta, self.config.path
        full = torch.nn.functional.pad(sinks, (0, call.num_keys - sinks.shape[-1]))
        if path == "auto" and seen is not None and seen.weights is not None and attend.alone and not call.wants_weights:
            part = direct.output_of_one(call, calibrate_attention(seen.weights, full, beta), heads)
            if len(heads) == call.num_heads:
                return AttentionOutput(part)
            host = attend(call)
            changed = host.out.clone()
            changed[:, list(heads)] = part
            return host.replace(out=changed)
        missing = fast.why_not(call)
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
