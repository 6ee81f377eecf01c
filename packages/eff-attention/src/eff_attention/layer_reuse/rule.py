"""What a layer does in a decoding step or a prompt: the rule that answers its attention.

The rule holds the policy alone. What anchors chose goes from layer to layer in a `Pass`, which a hook on the decoder
adds to the arguments of each forward pass; what is known of keys from step to step is kept with the cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels import decode_attention, scored_decode_attention
from eff_kernels.edit import uncompiled
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, rows
from eff_kernels.edit.caches import given_cache
from torch import Tensor

from eff_attention.layer_reuse.blocks import block_mass
from eff_attention.layer_reuse.config import LayerReuseConfig
from eff_attention.layer_reuse.policy import LayerReusePolicy
from eff_attention.layer_reuse.prefill import Prompt
from eff_attention.layer_reuse.selection import select_blocks
from eff_attention.layer_reuse.selectors import SELECTORS, KeyIndex

ARGUMENT = "eff_layer_reuse"
_INDICES = "_eff_layer_reuse"  # of a cache
_HIDDEN = -1e4  # an addend from which on a key counts as hidden


@dataclass(slots=True)
class Pass:
    """One forward pass: what its layers tell each other.

    Attributes:
        cache: The cache, or None.
        read: Whether a layer has looked at the mask.
        step: What the pass is, if it decodes one token.
        prompt: The same if it reads a prompt by the policy.
    """

    cache: Any = None
    read: bool = False
    step: Step | None = None
    prompt: Prompt | None = None

    def index(self, config: LayerReuseConfig, layer: int) -> KeyIndex:
        """What a layer remembers of the keys in the cache."""
        held = {} if self.cache is None else self.cache.__dict__.setdefault(_INDICES, {})
        key = config.selector, config.block_size, layer
        if key not in held:
            held[key] = SELECTORS[config.selector](config.block_size, layer)
        return held[key]

    def forget(self) -> None:
        """Other tokens than the next one come into the cache."""
        if self.cache is not None:
            self.cache.__dict__.pop(_INDICES, None)


def begin_pass(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hook of the decoder."""
    return args, {**kwargs, ARGUMENT: Pass(given_cache(kwargs))}


@dataclass(slots=True)
class Step:
    """One decoding step: where each sequence lies in the cache, and what its anchors chose."""

    firsts: list[int]
    lengths: list[int]
    real: Tensor
    dense_table: Tensor | None
    chosen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def store_selection(self, layer: int, mass: Tensor, config: LayerReuseConfig) -> None:
        """Note the places of the blocks that a layer gives the most weight."""
        index, lengths = select_blocks(mass, self.lengths, config)
        places = index * config.block_size
        if self.dense_table is not None:
            places += self.dense_table[:, :, None]
        self.chosen[layer] = places.to(torch.int32), lengths

    def run(self, keys: int) -> int | None:
        """Keys of the one run of each sequence, for attention to all of them."""
        return None if self.dense_table is None else keys

    def mask(self, anchor: int, keys: int, heads: int, size: int) -> Tensor:
        """What an anchor chose as a mask, bool [B, H, 1, S]."""
        places, lengths = self.chosen[anchor]
        at = (places[..., None] + torch.arange(size, device=places.device)).flatten(2).long()  # [B, KV, W * size]
        kept = torch.arange(at.size(2), device=at.device) < lengths[:, None, None]
        seen = torch.zeros(*at.shape[:2], keys + 1, dtype=torch.bool, device=at.device)
        seen.scatter_(2, at.where(kept, keys), True)
        return seen[..., None, :keys].repeat_interleave(heads // seen.size(1), 1)


@dataclass(frozen=True)
class ReuseRule:
    """The rule, the same for all layers."""

    policy: LayerReusePolicy
    config: LayerReuseConfig

    @functools.cached_property
    def anchors(self) -> frozenset[int]:
        """Layers whose choice is reused."""
        return frozenset(self.policy.source) - {-1}

    def __call__(self, call: AttentionCall, attend: Attend) -> Tensor | AttentionOutput:
        """Answer a call of a layer."""
        # Choices depend on lengths and contents: each step would be compiled by itself.
        return uncompiled(self._answer)(call, attend)

    def _answer(self, call: AttentionCall, attend: Attend) -> Tensor | AttentionOutput:
        if ARGUMENT not in call.extra:
            raise NotImplementedError(f"{call.name} does not get the arguments of its decoder, which layer reuse needs")
        now: Pass = call.extra[ARGUMENT]
        layer = call.layer
        if layer is None or call.window is not None or not self.anchors:
            return attend(call)
        if not now.read:
            now.read = True
            self._read(now, call)
        source, anchor = self.policy.source[layer], layer in self.anchors
        if now.prompt is not None:
            return self._prompt(now.prompt, call, attend, layer)
        if now.step is None:
            return attend(call)
        return (
            self._step(now, now.step, call, attend, layer)
            if anchor or source >= 0
            else self._full(now.step, call, attend)
        )

    def _prompt(self, prompt: Prompt, call: AttentionCall, attend: Attend, layer: int) -> Tensor | AttentionOutput:
        q, k, v = (t.to(call.dtype) for t in (call.q, call.k, call.v))
        if layer in self.anchors:
            prompt.select_by_means(layer, q, k, call.scale)
        if (source := self.policy.source[layer]) < 0:
            return attend(call)
        if _shared(call, attend):
            raise NotImplementedError(
                f"{call.name}: layer reuse of prompts cannot be combined with other rules on the same attention; "
                "use phase='decode'"
            )
        if more := _beyond(call):
            raise NotImplementedError(
                f"layer reuse of prompts supports neither dropout nor {more}; layer {layer} uses it"
            )
        return prompt.attend(source, q, k, v, call.scale)

    def _full(self, step: Step, call: AttentionCall, attend: Attend) -> Tensor | AttentionOutput:
        if not call.q.is_cpu or _shared(call, attend) or _beyond(call) or _wants_gradient(call):
            return attend(call)
        q, k, v = (t.to(call.dtype) for t in (call.q, call.k, call.v))
        table, run = step.dense_table, step.run(k.size(2))
        return decode_attention(q[:, :, 0], k, v, step.real, block_table=table, run=run, scale=call.scale)[:, :, None]

    def _step(self, now: Pass, step: Step, call: AttentionCall, attend: Attend, layer: int) -> Tensor | AttentionOutput:
        config, size, scale = self.config, self.config.block_size, call.scale
        fast = not (_shared(call, attend) or _beyond(call) or _wants_gradient(call))
        full, k, v = (t.detach().to(call.dtype) for t in (call.q, call.k, call.v))
        q, dense = full[:, :, 0], AttentionOutput(call.q)
        anchor = layer in self.anchors
        ranked = anchor and config.selector != "exact" and self.policy.kind[layer] == "anchor"
        if ranked:
            step.store_selection(layer, now.index(config, layer).mass(q, k, step.firsts, step.lengths, scale), config)
        elif anchor and fast:
            table, run = step.dense_table, step.run(k.size(2))
            out, mass = scored_decode_attention(
                q, k, v, step.real, score_block=size, block_table=table, run=run, scale=scale
            )
            step.store_selection(layer, mass, config)
            return out[:, :, None]
        elif anchor:
            dense = attend(call)
            step.store_selection(layer, _mass(call, step, size), config)
            return dense
        taken = layer if ranked else self.policy.source[layer]
        if not fast:
            return attend(call.replace(mask=step.mask(taken, call.num_keys, call.num_heads, size)))
        places, lengths = step.chosen[taken]
        return decode_attention(q, k, v, lengths, block_table=places, run=size, scale=scale)[:, :, None]

    def _read(self, now: Pass, call: AttentionCall) -> None:
        """Note whether this is a decoding step or a prompt that the policy is for, from what the layers may see."""
        if call.num_queries > 1 or call.num_keys <= self.config.min_seq_len:
            now.forget()
        if call.num_keys <= self.config.min_seq_len:
            return
        if call.num_queries == 1:
            now.step = _step_of(call, self.config.min_seq_len)
        elif self.config.phase == "both" and call.num_queries > self.config.min_seq_len and _is_causal(call):
            now.prompt = Prompt(call.num_queries, self.config)


def _shared(call: AttentionCall, attend: Attend) -> bool:
    """Whether other rules change this attention, which then has to be computed where they see it."""
    return attend.inside or bool(call.edits)


def _beyond(call: AttentionCall) -> str:
    """What the kernels do not have."""
    names = ("softcap", "sinks", "bias")
    return "dropout" if call.dropout else ", ".join(n for n in names if getattr(call, n) is not None)


def _wants_gradient(call: AttentionCall) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v))


def _mass(call: AttentionCall, step: Step, size: int) -> Tensor:
    """Weights of the blocks of each sequence, [B, KV, N], from the weights themselves."""
    with torch.no_grad():
        weights = rows(call, [0])[:, :, 0].unflatten(1, (call.num_kv_heads, -1)).sum(2)
        lines = [
            block_mass(torch.nn.functional.pad(w[:, f : f + n], (0, max(step.lengths) - n)), size)
            for w, f, n in zip(weights, step.firsts, step.lengths, strict=True)
        ]
    return torch.stack(lines)


def _seen(call: AttentionCall) -> Tensor | None:
    """What is visible, bool [B, 1 or H, Sq, Sk], or None where the mask is more than that."""
    mask = call.mask
    if isinstance(mask, Tensor) and mask.is_floating_point():
        added = call.replace(bias=None).additive_mask()
        if not ((added == 0) | (added <= _HIDDEN)).all():
            return None
        seen = added == 0
    else:
        seen = call.keep_mask()
    if seen.size(1) > 1 and not (seen == seen[:, :1]).all():
        return None
    return seen[:, :1].expand(call.k.size(0), 1, call.num_queries, call.num_keys)


def _step_of(call: AttentionCall, shortest: int) -> Step | None:
    """None where all sequences are short, or have holes."""
    batch, keys, device = call.k.size(0), call.num_keys, call.q.device
    firsts, lengths, table = [0] * batch, [keys] * batch, None
    if call.mask is not None:
        seen = _seen(call)
        if seen is None:
            return None
        line = seen[:, 0, 0]
        count, first = line.sum(1), line.int().argmax(1)
        place = torch.arange(keys, device=device)
        run = (place >= first[:, None]) & (place < (first + count)[:, None])
        if not torch.equal(run, line) or not count.all():
            return None
        firsts, lengths = first.tolist(), count.tolist()
        if any(firsts):
            table = first[:, None].to(torch.int32)
    if max(lengths) <= shortest:
        return None
    return Step(firsts, lengths, torch.tensor(lengths, dtype=torch.int32, device=device), table)


def _is_causal(call: AttentionCall) -> bool:
    """Whether each query sees all keys up to its own, the first query the first key alone."""
    if call.mask is None:
        return call.causal and call.offset == 0
    seen = _seen(call)
    if seen is None:
        return False
    place = torch.arange(call.num_keys, device=seen.device)
    return bool((seen == (place <= torch.arange(call.num_queries, device=seen.device)[:, None])).all())
