"""The ways to read few keys that the benchmark of layer reuse compares, and what each reads."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from eff_attention.layer_reuse import LayerReusePolicy, apply_layer_reuse
from eff_attention.layer_reuse.rule import ReuseRule, begin_pass
from eff_kernels import decode_attention, scored_decode_attention
from eff_kernels.edit.attention import decoder_attention, intercept_attention
from torch import Tensor


def previous(policy):
    """The same layers dense at both ends as the policy has, and one anchor for all between."""
    first = next(i for i, s in enumerate(policy.source) if s >= 0) - 1
    last = max(i for i, s in enumerate(policy.source) if s >= 0)
    source = [first if first < i <= last else -1 for i in range(len(policy.source))]
    kind = ["reuse" if s >= 0 else "anchor" if i == first else "full" for i, s in enumerate(source)]
    return LayerReusePolicy(kind=tuple(kind), source=tuple(source), score=0.0, meta={})


@dataclass(frozen=True)
class Alone(ReuseRule):
    """All layers but ``ends`` attend to what ``choose(mass)`` makes of their own weights: a bench of upper bounds."""

    ends: frozenset[int]
    choose: Callable[[Tensor], Tensor]

    @property
    def anchors(self):
        """All layers."""
        return frozenset(range(len(self.policy.source)))

    def _step(self, now, step, call, attend, layer):
        q, k, v, size = call.q[:, :, 0], call.k, call.v, self.config.block_size
        table, run = step.dense_table, step.run(k.size(2))
        out, mass = scored_decode_attention(
            q, k, v, step.real, score_block=size, block_table=table, run=run, scale=call.scale
        )
        if layer in self.ends:
            return out[:, :, None]
        step.store_selection(layer, self.choose(mass), self.config)
        places, lengths = step.chosen[layer]
        return decode_attention(q, k, v, lengths, block_table=places, run=size, scale=call.scale)[:, :, None]


def alone(model, config, ends, choose):
    """Attach `Alone`."""
    layers = model.config.num_hidden_layers
    anchors = LayerReusePolicy(kind=("anchor",) * layers, source=(-1,) * layers, score=1.0, meta={})
    names = set(decoder_attention(model))
    rule = Alone(anchors, config, frozenset(ends), choose)
    handle = intercept_attention(model, rule, where=lambda name, module: name in names)
    handle.on_remove(model.base_model.register_forward_pre_hook(begin_pass, with_kwargs=True).remove)
    return handle


def recent(mass):
    """The later the heavier: with the first block forced, the window of StreamingLLM."""
    return torch.arange(mass.size(2), dtype=mass.dtype).expand(mass.shape).clone()


def kv_bytes(model, lengths_of_layers):
    """Bytes of keys and values that one decoding step reads."""
    c = model.config
    return sum(lengths_of_layers) * 2 * c.num_key_value_heads * c.head_dim * 2


def index_bytes(config, model, selector):
    """Bytes of a layer's index for each key: a mean in float32 for each block, or 128 bits."""
    c = model.config
    per_head = {"pooled": 4 * c.head_dim / config.block_size, "hash": 16}
    return c.num_key_value_heads * per_head.get(selector, 0)


def methods(model, policy, config):
    """What is compared: a function that attaches each, and how many layers of it read few keys."""
    layers = len(policy.source)
    ends = {0, 1, layers - 1}
    of = {
        "dense": lambda: alone(model, config, set(range(layers)), recent),
        "sink and recent keys": lambda: alone(model, config, ends, recent),
        "every layer by itself": lambda: alone(model, config, ends, lambda mass: mass),
        "one anchor for all": lambda: apply_layer_reuse(model, previous(policy), config),
        "searched policy": lambda: apply_layer_reuse(model, policy, config),
    }
    for name in ("pooled", "hash"):
        chosen = dataclasses.replace(config, selector=name)
        of[f"searched policy, {name}"] = lambda chosen=chosen: apply_layer_reuse(model, policy, chosen)
    sparse = {"dense": 0, "sink and recent keys": layers - 3, "every layer by itself": layers - 3}
    sparse["one anchor for all"] = sum(s >= 0 for s in previous(policy).source)
    sparse["searched policy"] = sum(s >= 0 for s in policy.source)
    choosing = {s for s in policy.source if s >= 0}
    few = sparse["searched policy"] + sum(policy.kind[i] == "anchor" for i in choosing)
    sparse |= {"searched policy, pooled": few, "searched policy, hash": few}
    return of, sparse
