import functools

import torch
from eff_attention.layer_reuse import LayerReuseConfig, LayerReusePolicy, apply_layer_reuse
from method_table import Row, llama, logits, token_ids
from settings_row import TWO_RULES
from transformers import DynamicCache

POLICY = LayerReusePolicy(("full", "anchor", "reuse", "reuse"), (-1, -1, 1, 1))
# One choice for all heads, so that shared and own key-value heads choose the same.
CONFIG = LayerReuseConfig(top_k=12, block_size=4, min_seq_len=12, must_select=(0, -1), shared_heads=True)


def run(model, ids, mask=None, steps=4):
    """Logits of the last tokens, decoded one by one, as prompts are read densely."""
    inner = getattr(model, "_orig_mod", model)
    cache, found = DynamicCache(config=inner.config), []
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    name = "past_key_values"
    for first, last in [(0, ids.size(1) - steps), *((i, i + 1) for i in range(ids.size(1) - steps, ids.size(1)))]:
        out = model(
            input_ids=ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
            use_cache=True, **{name: cache},
        )  # fmt: skip
        found.append(out.logits[:, -1:])
    return torch.cat(found[1:], 1)


def save(model, folder):
    POLICY.save(folder / "policy.json")
    model.save_pretrained(folder / "model")


def load(folder):
    model = type(llama()).from_pretrained(folder / "model")
    apply_layer_reuse(model, LayerReusePolicy.load(folder / "policy.json"), CONFIG)
    return model


ROWS = [
    Row(
        name="layer_reuse",
        make=lambda: llama(layers=4),
        apply=lambda model: apply_layer_reuse(model, POLICY, CONFIG),
        zero=lambda model: apply_layer_reuse(model, LayerReusePolicy(("full",) * 4, (-1,) * 4), CONFIG),
        run=run,
        train=logits,
        brief=functools.partial(run, steps=1),
        data=token_ids,
        save=save,
        load=load,
        cannot={
            "twice": TWO_RULES,
            "stranger": "layer reuse needs a model on transformers' AttentionInterface, got <class '.*Sequential'>",
        },
        loose=0.5,  # a choice of blocks may tip over
    )
]
