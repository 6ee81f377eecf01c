"""One forward pass of calibration: what is known of the cache, and what its layers have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit.attention import AttentionCall, Role, TokenRoles
from eff_kernels.ops import attention_rows as rows
from torch import Tensor

from eff_attention.sink_calibration.config import ACTConfig
from eff_attention.sink_calibration.functional import Limits
from eff_attention.sink_calibration.measure import plain_rows
from eff_attention.sink_calibration.state import SinkState


@dataclass(frozen=True)
class Frame:
    """What the layers of a pass have in common, as far as they have the same keys.

    Attributes:
        prompt: Whether some of its tokens are of the prompt.
        real: Keys up to the last query that are no padding, bool [B, n].
        own: Queries that are none, bool [B, Sq].
        queries: Their number, of all sequences.
        seen_by: How many queries see each key if the call is plain, int64 [B, Sk]; None where there is padding.
    """

    prompt: bool
    real: Tensor
    own: Tensor
    queries: int
    seen_by: Tensor | None

    @classmethod
    def of(cls, call: AttentionCall, roles: TokenRoles) -> Frame:
        """The frame of a call."""
        prompt = bool((roles.queries.role != int(Role.GENERATED)).any())
        real = ~roles.keys.of(Role.PAD, Role.UNUSED)[:, : roles.position + call.num_queries]
        own = real[:, roles.position :]
        queries, keys = int(own.sum()), call.num_keys
        whole = queries == own.numel() and own.shape[1] == call.num_queries
        seen_by = plain_rows(own.shape[0], call.num_queries, keys, own.device) if whole else None
        return cls(prompt, real, own, queries, seen_by)


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        states: The states of the layers, by the name of the rule and the layer.
        notes: What one layer found that holds for others as well, with what it was found from.
    """

    states: dict[tuple[str, int], SinkState] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)

    def frame(self, call: AttentionCall, roles: TokenRoles) -> Frame:
        """The frame of a call."""
        key = "frame", call.num_queries, call.num_keys, roles.offset
        found: Frame | None = self.notes.get(key)
        if found is None:
            found = self.notes[key] = Frame.of(call, roles)
        return found

    def limits(self, config: ACTConfig, old: Tensor | None, new: Tensor, real: Tensor) -> tuple[Tensor, Limits]:
        """Queries that have seen each key, int64 [B, n], and the limits that follow.

        Args:
            config: Settings.
            old: What was known of them, int64 [B, m]; None for nothing.
            new: Those of this pass, int64 [B, Sk].
            real: Keys that are tokens, bool [B, n].
        """
        key = "limits", id(config), id(old), id(new), id(real)
        found = self.notes.get(key)
        if found is None:
            length = real.shape[1]
            seen = new[:, :length]
            if old is not None:
                seen = torch.nn.functional.pad(old, (0, length - old.shape[1])) + seen
            limits = Limits.of(
                seen[:, None], real[:, None], config.threshold, spare=config.spare, min_rows=config.min_rows
            )
            # What the key names is kept, so that no other thing gets its id.
            found = self.notes[key] = (seen, limits, (config, old, new, real))
        return found[0], found[1]

    def of_one(self, limits: Limits) -> rows.Limits:
        """The same limits as one compiled step of a query takes them."""
        key = "one", id(limits)
        found = self.notes.get(key)
        if found is None:
            counts, bound = limits.rows[:, 0].contiguous(), limits.bound
            wide = bound.reshape(-1).float() if isinstance(bound, Tensor) else torch.full((len(counts),), bound)
            found = self.notes[key] = (
                rows.Limits(
                    counts, limits.may_be[:, 0].contiguous(), wide.to(counts.device), limits.spare == "first_sink"
                ),
                limits,
            )
        return found[0]
