import functools

import torch
from eff_attention.neighborhood import register_sliding_window
from eff_kernels import Handle
from method_table import Row, logits, token_ids
from transformers import MistralConfig, MistralForCausalLM

NAME = "eff_sliding_window_row"


@functools.cache
def register():
    return register_sliding_window(NAME)


def make():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        num_key_value_heads=2, initializer_range=0.2, sliding_window=6, attn_implementation="sdpa",
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def apply(model):
    register()
    handle = Handle()
    handle.on_remove(functools.partial(model.set_attn_implementation, model.config._attn_implementation))
    model.set_attn_implementation(NAME)
    return handle


ROWS = [
    Row(
        name="neighborhood sliding window",
        make=make,
        apply=apply,
        run=logits,
        absent=dict.fromkeys(
            ("twice", "stranger"), "a name of transformers' attention, which set_attn_implementation takes"
        ),
        data=token_ids,
        save=lambda model, folder: model.save_pretrained(folder),
        load=lambda folder: MistralForCausalLM.from_pretrained(folder, attn_implementation=NAME),
    )
]
