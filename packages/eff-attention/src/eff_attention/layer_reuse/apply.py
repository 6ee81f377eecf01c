"""Decode with layers that reuse the choice of keys of an earlier layer, in any decoder of transformers.

The attention function of the model is replaced under a name of its own; it knows its layer by ``module.layer_idx``.
The mask function that is registered with it sees each forward pass first and says whether this is a decoding step
and which keys of each sequence are real.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from eff_kernels import Handle, decode_attention, scored_decode_attention
from torch import Tensor

from eff_attention.layer_reuse.choose import choose_blocks
from eff_attention.layer_reuse.config import LayerReuseConfig
from eff_attention.layer_reuse.policy import LayerReusePolicy
from eff_attention.layer_reuse.prefill import Prompt
from eff_attention.layer_reuse.selectors import SELECTORS, KeyIndex

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_numbers = itertools.count()


@dataclass(slots=True)
class _Step:
    """One decoding step: where each sequence lies in the cache, and what its anchors chose."""

    firsts: list[int]
    lengths: list[int]
    real: Tensor
    dense_table: Tensor | None
    chosen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def choose(self, layer: int, mass: Tensor, config: LayerReuseConfig) -> None:
        """Note the places of the blocks that a layer gives the most weight."""
        index, lengths = choose_blocks(mass, self.lengths, config)
        rows = index * config.block_size
        if self.dense_table is not None:
            rows += self.dense_table[:, :, None]
        self.chosen[layer] = rows.to(torch.int32), lengths

    def attend(self, anchor: int, q: Tensor, k: Tensor, v: Tensor, size: int, scale: float) -> Tensor:
        """Attention [B, H, D] to the blocks that an anchor chose."""
        rows, lengths = self.chosen[anchor]
        return decode_attention(q, k, v, lengths, block_table=rows, run=size, scale=scale)


def apply_layer_reuse(
    model: PreTrainedModel, policy: LayerReusePolicy, config: LayerReuseConfig | None = None
) -> Handle:
    """Let the reusing layers of a policy attend only to the blocks of keys that their anchors chose.

    Anchors choose as ``config.selector`` says, by default by the weights of their own dense attention; layers of kind
    "full" run dense (on the CPU by `decode_attention` too, which is faster there). Prompts run as before, but for phase
    "both"; so do steps of more than one token, and masks other than causal ones with padding.

    Args:
        model: A decoder that follows transformers' AttentionInterface, such as Llama, Qwen2, Qwen3 or Mistral.
        policy: Kind and source of each layer.
        config: How many keys, and from which length on.

    Returns:
        A handle; ``remove()`` gives the model back.

    Raises:
        ValueError: the policy is for another number of layers, or names layers without full attention.
        NotImplementedError: the model is not built on AttentionInterface, or has another implementation than a
            registered one ("eager").
    """
    config = config or LayerReuseConfig()
    _check(model, policy)
    from transformers import AttentionInterface, AttentionMaskInterface

    runtime = _Runtime(policy, config, model.config._attn_implementation, _types(model.config))
    handle = Handle()
    name = f"eff_layer_reuse_{next(_numbers)}"
    for registry, function in ((AttentionInterface, runtime.attention), (AttentionMaskInterface, runtime.mask)):
        mapping: dict[str, Any] = registry._global_mapping
        registry.register(name, function)
        handle.on_remove(functools.partial(mapping.pop, name, None))
    hook = model.base_model.register_forward_pre_hook(runtime.begin, with_kwargs=True)
    handle.on_remove(hook.remove)
    handle.on_remove(functools.partial(model.set_attn_implementation, runtime.original_name))
    model.set_attn_implementation(name)
    return handle


def _check(model: PreTrainedModel, policy: LayerReusePolicy) -> None:
    from transformers import AttentionInterface, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise NotImplementedError(f"layer reuse needs a model on transformers' AttentionInterface, got {type(model)}")
    settings = model.config
    if getattr(settings, "is_encoder_decoder", False):
        raise NotImplementedError(f"layer reuse is for decoders, {type(model).__name__} has an encoder")
    if settings._attn_implementation not in AttentionInterface._global_mapping:
        raise NotImplementedError(
            f"layer reuse stands on a registered attention, got {settings._attn_implementation!r}; "
            "call model.set_attn_implementation('sdpa') first"
        )
    if len(policy.kind) != settings.num_hidden_layers:
        raise ValueError(f"the policy has {len(policy.kind)} layers, the model {settings.num_hidden_layers}")
    types = _types(settings)
    taken = {i for i, source in enumerate(policy.source) if source >= 0} | set(policy.source) - {-1}
    wrong = {i: types[i] for i in sorted(taken) if types[i] != "full_attention"}
    if wrong:
        raise ValueError(f"layers that reuse or are reused must have full attention, got {wrong}")


def _types(settings: Any) -> list[str]:
    """Kind of attention of each layer."""
    windowed = getattr(settings, "sliding_window", None) is not None
    every = ["sliding_attention" if windowed else "full_attention"] * settings.num_hidden_layers
    return getattr(settings, "layer_types", None) or every


class _Runtime:
    """The two functions that transformers calls, and what one forward pass tells the other."""

    def __init__(self, policy: LayerReusePolicy, config: LayerReuseConfig, original: str, types: list[str]) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self.config, self.original_name = config, original
        self.source, self.types = policy.source, types
        self.anchors = {s for s in policy.source if s >= 0}
        self.indices: dict[int, KeyIndex] = {}
        if config.selector != "exact":
            make = SELECTORS[config.selector]
            self.indices = {i: make(config.block_size, i) for i in self.anchors if policy.kind[i] == "anchor"}
        attentions: dict[str, Any] = AttentionInterface._global_mapping
        masks: dict[str, Any] = AttentionMaskInterface._global_mapping
        self.original, self.original_mask = attentions[original], masks[original]
        self.step: _Step | None = None
        self.prompt: Prompt | None = None
        self.made: Any = None  # the mask that belongs to it
        self.cache: Callable[[], Any] = lambda: None  # of the last pass

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forget the last pass, unless ``generate`` made the mask of this one before, as it does for a static cache.

        What is known of keys goes with the cache that it is of.
        """
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is None or self.cache() is not cache:
            for index in self.indices.values():
                index.forget()
            self.cache = (lambda: None) if cache is None else weakref.ref(cache)
        given = kwargs.get("attention_mask")
        masks = given.values() if isinstance(given, dict) else [given]
        if self.made is None or all(mask is not self.made for mask in masks):
            self.step = self.prompt = None

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        *,
        mask_function: Callable[..., Any],
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The mask of the original implementation; on the way, note what the step is like."""
        from transformers.masking_utils import causal_mask_function

        causal: Callable[..., Any] = causal_mask_function
        plain = kv_offset == 0 and local_size is None and mask_function is causal
        if plain:
            self.step = self.prompt = None
            if q_length == 1:
                self.step = self._step(batch_size, int(q_offset) + 1, kv_length, attention_mask, kwargs.get("device"))
            elif int(q_offset) == 0:
                self.prompt = self._prompt(q_length, attention_mask)
        mask = self.original_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **kwargs,
        )  # fmt: skip
        if plain and mask is not None:
            mask = mask.contiguous()  # as ``generate`` does, which would make another tensor of it
            self.made = mask
        return mask

    def _prompt(self, length: int, mask: Tensor | None) -> Prompt | None:
        """None where prompts are read densely, the prompt is short, or a sequence is padded."""
        if self.config.phase == "decode" or length <= self.config.min_seq_len or not self.anchors:
            return None
        return Prompt(length, self.config) if mask is None or mask[:, :length].all() else None

    def _step(self, batch: int, end: int, room: int, mask: Tensor | None, device: Any) -> _Step | None:
        """None where all sequences are short, or have holes."""
        if end <= self.config.min_seq_len or not self.anchors:
            return None
        firsts, table = [0] * batch, None
        if mask is not None and not mask[:, :end].all():
            count = mask[:, :end].sum(1)
            first = end - count
            if not (mask[:, :end] == (torch.arange(end, device=mask.device) >= first[:, None])).all():
                return None
            firsts = first.tolist()
            table = first[:, None].to(torch.int32)
        lengths = [end - f for f in firsts]
        if max(lengths) <= self.config.min_seq_len:
            return None
        return _Step(firsts, lengths, torch.tensor(lengths, dtype=torch.int32, device=device), table)

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Transformers' attention function: [B, H, 1, D] to [B, 1, H, D]."""
        layer, step = module.layer_idx, self.step
        scale = query.size(-1) ** -0.5 if scaling is None else scaling
        if step is None and layer in self.indices:
            self.indices[layer].forget()
        if self.prompt is not None and layer in self.anchors:
            self.prompt.choose(layer, query, key, scale)
        extra = sorted(n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None)
        full = layer not in self.anchors and self.source[layer] < 0
        ours = self.types[layer] == "full_attention" and query.is_cpu and not dropout and not extra
        reads = self.prompt is not None and self.source[layer] >= 0
        if (step is None and not reads) or (full and not ours):
            return self.original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        if dropout or extra:
            raise NotImplementedError(f"layer reuse has neither dropout nor {extra or 'biases'}; layer {layer} has it")
        if self.prompt is not None:
            return self.prompt.attend(self.source[layer], query, key, value, scale).transpose(1, 2), None
        assert step is not None
        size, q = self.config.block_size, query[:, :, 0]
        run = None if step.dense_table is None else key.size(2)
        if full:
            out = decode_attention(q, key, value, step.real, block_table=step.dense_table, run=run, scale=scale)
        elif layer in self.indices:
            step.choose(layer, self.indices[layer].mass(q, key, step.firsts, step.lengths, scale), self.config)
            out = step.attend(layer, q, key, value, size, scale)
        elif layer in self.anchors:
            out, mass = scored_decode_attention(
                q, key, value, step.real, score_block=size, block_table=step.dense_table, run=run, scale=scale
            )
            step.choose(layer, mass, self.config)
        else:
            out = step.attend(self.source[layer], q, key, value, size, scale)
        return out[:, None], None
