"""The ways to read few keys that the benchmark of layer reuse compares, and what each reads."""

import dataclasses

import torch
from eff_attention.layer_reuse import LayerReusePolicy, apply, apply_layer_reuse, select_blocks
from eff_kernels import decode_attention, scored_decode_attention


def dense(layers):
    """Every layer an anchor that nobody reuses: dense attention by our kernel once `every_layer` takes them in."""
    return LayerReusePolicy(kind=("anchor",) * layers, source=(-1,) * layers, score=1.0, meta={})


def previous(policy):
    """The same layers dense at both ends as the policy has, and one anchor for all between."""
    first = next(i for i, s in enumerate(policy.source) if s >= 0) - 1
    last = max(i for i, s in enumerate(policy.source) if s >= 0)
    source = [first if first < i <= last else -1 for i in range(len(policy.source))]
    kind = ["reuse" if s >= 0 else "anchor" if i == first else "full" for i, s in enumerate(source)]
    return LayerReusePolicy(kind=tuple(kind), source=tuple(source), score=0.0, meta={})


def alone(model, config, ends, choose):
    """All layers but ``ends`` attend to what ``choose(mass)`` makes of their own weights: a bench of upper bounds."""
    layers = model.config.num_hidden_layers
    handle = apply_layer_reuse(model, dense(layers), config)
    runtime = runtime_of(model)
    runtime.anchors = set(range(layers))
    state = {"layer": 0}

    def scored(q, k, v, lengths, **options):
        out, mass = scored_decode_attention(q, k, v, lengths, **options)
        layer, state["layer"] = state["layer"], (state["layer"] + 1) % layers
        if layer in ends:
            return out, mass
        index, kept = select_blocks(choose(mass), lengths.tolist(), config)
        rows = (index * config.block_size).to(torch.int32)
        return decode_attention(q, k, v, kept, block_table=rows, run=config.block_size, scale=options["scale"]), mass

    apply.scored_decode_attention = scored
    handle.on_remove(lambda: setattr(apply, "scored_decode_attention", scored_decode_attention))
    return handle


def runtime_of(model):
    from transformers import AttentionInterface

    return AttentionInterface._global_mapping[model.config._attn_implementation].__self__


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
