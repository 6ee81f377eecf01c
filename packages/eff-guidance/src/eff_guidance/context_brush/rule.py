"""The rule that the brush puts into the joint attention of a transformer."""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels.edit.attention import Attend, AttentionCall, rows
from torch import Tensor

from eff_guidance.context_brush.attention import (
    Index,
    Portion,
    add_shares,
    head_gains_from_mass,
    mass_dtype,
    split_attention,
)
from eff_guidance.context_brush.config import ContextBrushConfig
from eff_guidance.context_brush.spans import CanvasSpans
from eff_guidance.denoiser import check_whole, current_call

_ROWS = 1024  # rows whose whole weights are held at once where fused kernels cannot serve


class BrushRule:
    """Shifts outputs of the target's rows and scales heads.

    Attributes:
        spans: Of the canvas.
        config: Strengths.
        enabled: Whether it acts; a switch of the whole model, not of one call.
    """

    def __init__(self, spans: CanvasSpans, config: ContextBrushConfig) -> None:
        self.spans, self.config, self.enabled = spans, config, True
        self._subject, self._query = spans.subject_index(), spans.query_index()

    def __call__(self, call: AttentionCall, attend: Attend) -> Any:
        """Answer a call of joint attention."""
        answer = attend(call)
        shift, gain = self._strengths(call)
        if not (shift or gain) or not self._now():
            return answer
        check_whole(call.module)
        text, image = self._streams(call)
        subject, query = (_moved(i, image.start) for i in (self._subject, self._query))
        groups: dict[str, Index] = {"text": text, "subject": subject, "query": query}
        parts = _portions(call, query, groups)
        out = answer.out
        if shift:
            weights = {"subject": self.config.shift_image, "text": self.config.shift_text}
            out = add_shares(out, query, [(w, *parts[name]) for name, w in weights.items() if w])
        if gain:
            gains = head_gains_from_mass(parts["text"].mass.sum(-1), self.config.head_gain)[..., None, None]
            out = _scaled(out, gains, None if self.config.head_rows == "all" else query)
        return answer.replace(out=out)

    def _strengths(self, call: AttentionCall) -> tuple[bool, bool]:
        config = self.config
        kind = "single" if getattr(call.module, "added_kv_proj_dim", None) is None else "double"
        shift = kind in config.blocks and (config.shift_image > 0 or config.shift_text > 0)
        return shift, kind in config.reweight_blocks and config.head_gain > 0

    def _now(self) -> bool:
        config = self.config
        if not self.enabled or config.start == config.stop:
            return False
        if (config.start, config.stop) == (0.0, 1.0):
            return True
        now = current_call()
        if now is None:
            raise RuntimeError(f"start={config.start}, stop={config.stop}: the transformer must be called as a whole")
        return now.inside(config.start, config.stop)

    def _streams(self, call: AttentionCall) -> tuple[slice, slice]:
        if call.streams is None or not {"text", "image"} <= set(call.streams):
            raise ValueError(
                f"{call.name} ({type(call.module).__name__}): the order of its text and picture tokens is not known, "
                "so that the canvas cannot be found in them"
            )
        text, image = call.streams["text"], call.streams["image"]
        length = image.stop - image.start
        if length != self.spans.num_tokens:
            rows_, columns = self.spans.grid
            raise ValueError(
                f"{call.name} reads {length} picture tokens, the canvas has {rows_} x {columns} = "
                f"{self.spans.num_tokens}; generate at the size of the canvas"
            )
        return text, image


def _moved(index: Index, by: int) -> Index:
    return slice(index.start + by, index.stop + by) if isinstance(index, slice) else index + by


def _portions(call: AttentionCall, query: Index, groups: dict[str, Index]) -> dict[str, Portion]:
    """What the query rows read from each group: fused, or from whole weights where a mask or an edit is about."""
    device = call.q.device
    groups = {name: i if isinstance(i, slice) else i.to(device) for name, i in groups.items()}
    query = query if isinstance(query, slice) else query.to(device)
    none = (call.mask, call.softcap, call.window, call.sinks, call.bias)
    if not call.edits and not call.causal and all(x is None for x in none) and call.num_heads == call.num_kv_heads:
        q, k, v = (t.to(call.dtype) for t in (call.q, call.k, call.v))
        return split_attention(q[:, :, query], k, v, groups, call.scale)
    places = torch.arange(call.num_queries)[query if isinstance(query, slice) else query.cpu()]
    value = call.v.repeat_interleave(call.num_heads // call.num_kv_heads, 1).to(mass_dtype(call.q))
    found: dict[str, list[Portion]] = {name: [] for name in groups}
    for some in places.split(_ROWS):
        weights = rows(call, some).to(value.dtype)
        for name, at in groups.items():
            part, mass = weights[..., at] @ value[:, :, at], weights[..., at].sum(-1)
            # Of a portion only mass * out is used, which is part.
            found[name].append(Portion(mass, part / mass.clamp(min=torch.finfo(mass.dtype).tiny)[..., None]))
    return {n: Portion(*(torch.cat(x, 2) for x in zip(*parts, strict=True))) for n, parts in found.items()}


def _scaled(out: Tensor, gains: Tensor, query: Index | None) -> Tensor:
    if query is None:
        return (out.to(gains.dtype) * gains).to(out.dtype)
    made = out.clone()
    at = query if isinstance(query, slice) else query.to(out.device)
    made[:, :, at] = (out[:, :, at].to(gains.dtype) * gains).to(out.dtype)
    return made
